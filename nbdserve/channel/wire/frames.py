"""Frames: what goes over a channel once both ends have proven themselves (docs/channel.md, "Frames").

A frame is a header, three numbers of 32 bits in network order (type, stream, length), and as many bytes of
payload. Data is passed on as it arrives, in pieces, so that nothing waits for the end of a frame.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

from nbdserve.common.errors import ProtocolError

HEADER = struct.Struct(">III")
MOST_DATA = 64 << 10
"""The longest payload of a frame, in bytes."""
MOST_TEXT = 200
"""The longest text, in bytes of UTF-8."""
_NUMBER = struct.Struct(">I")
_VALUE = struct.Struct(">Q")


class Type(IntEnum):
    """What a frame is."""

    DATA = 1
    CREDIT = 2
    OPEN = 3
    END = 4
    RESET = 5
    PING = 6
    PONG = 7
    RAM = 8
    DONE = 9
    BYE = 10
    CLOSE = 11


class ResetReason(IntEnum):
    """Why a stream is given up."""

    BROKEN = 1
    """What is behind this end of it failed, or went away."""
    REFUSED = 2
    """It cannot be opened: there is nobody who takes it, or no room."""
    ANSWER = 3
    """The other end gave it up, and this one has taken note."""


class RamStatus(IntEnum):
    """What has become of the migration stream at the destination."""

    LOADED = 1
    FAILED = 2


class CloseReason(IntEnum):
    """Why an end ends the connection."""

    PROTOCOL = 1
    """What it received is not in the specification."""
    REPLACED = 2
    """Another connection has taken the session over."""
    STOPPED = 3
    """Its operator has stopped it."""
    FAILED = 4
    """It cannot go on."""


@dataclass(frozen=True, slots=True)
class Data:
    """A piece of a stream, in the memory that was fed."""

    stream: int
    piece: memoryview


@dataclass(frozen=True, slots=True)
class Credit:
    """So many bytes more may be sent."""

    stream: int
    count: int


@dataclass(frozen=True, slots=True)
class Open:
    """A new stream."""

    stream: int


@dataclass(frozen=True, slots=True)
class End:
    """Nothing more is sent on a stream."""

    stream: int


@dataclass(frozen=True, slots=True)
class Reset:
    """A stream is given up, in both directions."""

    stream: int
    reason: ResetReason
    text: str = ""


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for a Pong of the same value."""

    value: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Answers a Ping."""

    value: int


@dataclass(frozen=True, slots=True)
class Ram:
    """The destination says what has become of the migration stream."""

    status: RamStatus


@dataclass(frozen=True, slots=True)
class Done:
    """The destination needs nothing more."""


@dataclass(frozen=True, slots=True)
class Bye:
    """The source has taken note of that, and ends."""


@dataclass(frozen=True, slots=True)
class Close:
    """The last frame of an end that ends the connection for a reason."""

    reason: CloseReason
    text: str = ""


Control = Credit | Open | End | Reset | Ping | Pong | Ram | Done | Bye | Close
Frame = Data | Control

_LENGTHS = {
    Type.DATA: (1, MOST_DATA),
    Type.CREDIT: (4, 4),
    Type.OPEN: (0, 0),
    Type.END: (0, 0),
    Type.RESET: (4, 4 + MOST_TEXT),
    Type.PING: (8, 8),
    Type.PONG: (8, 8),
    Type.RAM: (4, 4),
    Type.DONE: (0, 0),
    Type.BYE: (0, 0),
    Type.CLOSE: (4, 4 + MOST_TEXT),
}
"""The shortest and the longest payload of each type."""
_OF_STREAMS = {Type.DATA, Type.CREDIT, Type.OPEN, Type.END, Type.RESET}


def encode(frame: Control) -> bytes:
    """Return a frame's bytes. A text that is too long is cut."""
    match frame:
        case Credit(stream, count):
            return _encoded(Type.CREDIT, stream, _NUMBER.pack(count))
        case Open(stream):
            return _encoded(Type.OPEN, stream)
        case End(stream):
            return _encoded(Type.END, stream)
        case Reset(stream, reason, text):
            return _encoded(Type.RESET, stream, _NUMBER.pack(reason) + _text(text))
        case Ping(value):
            return _encoded(Type.PING, 0, _VALUE.pack(value))
        case Pong(value):
            return _encoded(Type.PONG, 0, _VALUE.pack(value))
        case Ram(status):
            return _encoded(Type.RAM, 0, _NUMBER.pack(status))
        case Done():
            return _encoded(Type.DONE, 0)
        case Bye():
            return _encoded(Type.BYE, 0)
        case Close(reason, text):
            return _encoded(Type.CLOSE, 0, _NUMBER.pack(reason) + _text(text))


class Decoder:
    """Cuts what arrives into frames, however it is cut itself."""

    def __init__(self) -> None:
        self._partial = bytearray()
        # Of the DATA frame that has begun.
        self._stream = 0
        self._left = 0

    @property
    def is_between_frames(self) -> bool:
        """Tell whether everything that arrived was whole."""
        return not self._left and not self._partial

    def feed(self, data: memoryview) -> Iterator[Frame]:
        """Yield what is in these bytes; ProtocolError for what is not in the specification."""
        at, end = 0, len(data)
        while at < end:
            if self._left:
                count = min(self._left, end - at)
                self._left -= count
                yield Data(self._stream, data[at : at + count])
                at += count
                continue
            if not self._partial and end - at >= HEADER.size:
                kind, stream, length = _checked(*HEADER.unpack_from(data, at))
                if kind is Type.DATA:
                    self._stream, self._left = stream, length
                    at += HEADER.size
                    continue
            at += self._collect(data[at:end])
            if (frame := self._whole()) is not None:
                yield frame

    def _collect(self, data: memoryview) -> int:
        """Take what belongs to a header, or to a frame that is not data; returns how much that was."""
        wanted = HEADER.size
        if len(self._partial) >= HEADER.size:
            wanted += HEADER.unpack_from(self._partial)[2]
        piece = data[: wanted - len(self._partial)]
        self._partial += piece
        return len(piece)

    def _whole(self) -> Control | None:
        """The frame that was collected, if it is whole."""
        if len(self._partial) < HEADER.size:
            return None
        kind, stream, length = _checked(*HEADER.unpack_from(self._partial))
        if kind is Type.DATA:
            self._stream, self._left = stream, length
            self._partial.clear()
            return None
        if len(self._partial) < HEADER.size + length:
            return None
        payload = bytes(self._partial[HEADER.size :])
        self._partial.clear()
        return _decoded(kind, stream, payload)


def _checked(number: int, stream: int, length: int) -> tuple[Type, int, int]:
    try:
        kind = Type(number)
    except ValueError:
        raise ProtocolError(f"channel: there is no frame of type {number}") from None
    shortest, longest = _LENGTHS[kind]
    if not shortest <= length <= longest:
        raise ProtocolError(f"channel: a frame {kind.name} of {length} bytes")
    if (stream != 0) != (kind in _OF_STREAMS):
        raise ProtocolError(f"channel: a frame {kind.name} for stream {stream}")
    return kind, stream, length


def _decoded(kind: Type, stream: int, payload: bytes) -> Control:
    match kind:
        case Type.CREDIT:
            return Credit(stream, _number(kind, payload))
        case Type.OPEN:
            return Open(stream)
        case Type.END:
            return End(stream)
        case Type.RESET:
            return Reset(stream, _member(ResetReason, kind, payload), _readable(kind, payload[4:]))
        case Type.PING:
            return Ping(_VALUE.unpack(payload)[0])
        case Type.PONG:
            return Pong(_VALUE.unpack(payload)[0])
        case Type.RAM:
            return Ram(_member(RamStatus, kind, payload))
        case Type.DONE:
            return Done()
        case Type.BYE:
            return Bye()
        case _:
            return Close(_member(CloseReason, kind, payload), _readable(kind, payload[4:]))


def _number(kind: Type, payload: bytes) -> int:
    (number,) = _NUMBER.unpack_from(payload)
    if not number:
        raise ProtocolError(f"channel: a frame {kind.name} of nothing")
    return int(number)


E = TypeVar("E", bound=IntEnum)


def _member(numbers: type[E], kind: Type, payload: bytes) -> E:
    (number,) = _NUMBER.unpack_from(payload)
    try:
        return numbers(number)
    except ValueError:
        raise ProtocolError(f"channel: a frame {kind.name} has no {numbers.__name__} {number}") from None


def _encoded(kind: Type, stream: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(kind, stream, len(payload)) + payload


def _text(text: str) -> bytes:
    printable = "".join(each if each.isprintable() else " " for each in text)
    return printable.encode(errors="replace")[:MOST_TEXT].decode(errors="ignore").encode()


def _readable(kind: Type, data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = "\0"
    if text and not text.isprintable():
        raise ProtocolError(f"channel: the text in a frame {kind.name} cannot be read")
    return text
