"""A raw NBD client for what stock clients never send: every byte is the test's own.

It shares nothing with ``nbdserve.protocol``, so that a mistake there cannot hide here. Numbers and layouts
are those of the NBD protocol document (doc/proto.md): "Newstyle negotiation", "Transmission phase", and of
its branch extension-ext-header.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from types import TracebackType
from typing import Self

from tests.support.servers import Address

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_REPLY_MAGIC = 0x6E8A278C

GREETING = struct.Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
OPTION = struct.Struct(">QII")  # IHAVEOPT, option, length of data
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, reply type, length of data
REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length of payload
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, offset, length
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")  # magic, flags, type, cookie, offset of request, length of payload


class Option(IntEnum):
    """What a client may ask for while haggling."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(IntEnum):
    """How a server answers an option; errors have the highest bit set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


class Command(IntEnum):
    """The types of requests."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class Kind(IntEnum):
    """The types of chunks; errors have the highest bit set."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


class Flag(IntFlag):
    """The flags of requests."""

    NONE = 0
    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16
    PAYLOAD_LEN = 32


@dataclass(frozen=True)
class OptionReply:
    """One reply to an option."""

    option: int
    kind: int
    data: bytes


@dataclass(frozen=True)
class SimpleReply:
    """The head of a simple reply; the data of a read follows it."""

    error: int
    cookie: int


@dataclass(frozen=True)
class Chunk:
    """One chunk of a structured reply; ``offset`` is its request's, which only extended headers repeat."""

    done: bool
    kind: int
    cookie: int
    payload: bytes
    offset: int = 0

    @property
    def error(self) -> int:
        """The error value that the chunk tells of; 0 for any other chunk."""
        return int.from_bytes(self.payload[:4], "big") if self.kind & 0x8000 else 0

    @property
    def message(self) -> str:
        """The sentence that comes with an error."""
        return self.payload[6 : 6 + int.from_bytes(self.payload[4:6], "big")].decode()

    @property
    def extents(self) -> tuple[int, list[tuple[int, int]]]:
        """The context that a block status is about, and pairs of a length in bytes and a status."""
        context = int.from_bytes(self.payload[:4], "big")
        if self.kind == Kind.BLOCK_STATUS:
            return context, list(struct.iter_unpack(">II", self.payload[4:]))
        assert self.kind == Kind.BLOCK_STATUS_EXT
        pairs = list(struct.iter_unpack(">QQ", self.payload[8:]))
        assert int.from_bytes(self.payload[4:8], "big") == len(pairs)
        return context, pairs


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    """An option as it goes over the wire; ``length`` lies about the length of the data."""
    return OPTION.pack(IHAVEOPT, number, len(data) if length is None else length) + data


def export_query(name: str, information: tuple[int, ...] = ()) -> bytes:
    """The data of INFO and GO: a name and the kinds of information that are wanted."""
    encoded = name.encode()
    return struct.pack(
        f">I{len(encoded)}sH{len(information)}H", len(encoded), encoded, len(information), *information
    )


def meta_query(name: str, *queries: str) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    parts = [struct.pack(">I", len(name.encode())), name.encode(), struct.pack(">I", len(queries))]
    for query in queries:
        parts += [struct.pack(">I", len(query.encode())), query.encode()]
    return b"".join(parts)


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    cookie: int = 0,
    flags: int = 0,
    data: bytes = b"",
) -> bytes:
    """A request as it goes over the wire; of a write, ``data`` is the payload and gives the length."""
    return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, len(data) or length) + data


def extended_request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    cookie: int = 0,
    flags: int = 0,
    data: bytes = b"",
) -> bytes:
    """A request with an extended header; ``data`` sets the flag PAYLOAD_LEN and gives the length."""
    if data:
        flags, length = flags | Flag.PAYLOAD_LEN, len(data)
    return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length) + data


class Wire:
    """A connection to a server, spoken byte by byte. Every receive has a time limit."""

    def __init__(self, address: Address, seconds: float = 60.0) -> None:
        """Connect; ``seconds`` is the time limit of each operation on the socket."""
        self.socket = address.connect(seconds)
        self._extended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, *parts: bytes) -> None:
        """Send all parts in one go."""
        self.socket.sendall(b"".join(parts))

    def send_slowly(self, data: bytes, pause: float = 0.0) -> None:
        """Send one byte at a time, ``pause`` seconds apart."""
        if self.socket.family != socket.AF_UNIX:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for position in range(len(data)):
            self.socket.sendall(data[position : position + 1])
            time.sleep(pause)

    def receive(self, count: int) -> bytes:
        """Receive exactly so many bytes; EOFError when the server closes first."""
        received = bytearray()
        while len(received) < count:
            part = self.socket.recv(count - len(received))
            if not part:
                raise EOFError(f"the server closed after {len(received)} of {count} bytes")
            received += part
        return bytes(received)

    def is_closed_by_server(self) -> bool:
        """Whether the server closes the connection now, without another byte. Waits for the time limit."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def greet(self, flags: int = 3) -> int:
        """Take the greeting, answer with client flags (fixed newstyle, no zeroes) and return the server's."""
        magic, have_option, server_flags = GREETING.unpack(self.receive(GREETING.size))
        assert (magic, have_option) == (NBDMAGIC, IHAVEOPT)
        self.send(struct.pack(">I", flags))
        return int(server_flags)

    def option_reply(self) -> OptionReply:
        """Receive one reply to an option."""
        magic, number, kind, length = OPTION_REPLY.unpack(self.receive(OPTION_REPLY.size))
        assert magic == OPTION_REPLY_MAGIC
        return OptionReply(number, kind, self.receive(length))

    def haggle(self, number: int, data: bytes = b"") -> list[OptionReply]:
        """Send an option and receive its replies, up to and with the acknowledgement or the error."""
        self.send(option(number, data))
        replies = [self.option_reply()]
        while replies[-1].kind != Reply.ACK and replies[-1].kind < Reply.ERR_UNSUP:
            replies.append(self.option_reply())
        return replies

    def go(
        self,
        export: str = "",
        *,
        structured: bool = False,
        extended: bool = False,
        contexts: tuple[str, ...] = (),
    ) -> list[int]:
        """Greet and haggle until transmission begins; return the ids of the contexts that were selected."""
        self.greet()
        if extended:
            assert self.haggle(Option.EXTENDED_HEADERS)[-1].kind == Reply.ACK
            self._extended = True
        elif structured or contexts:
            assert self.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        selected: list[OptionReply] = []
        if contexts:
            *selected, last = self.haggle(Option.SET_META_CONTEXT, meta_query(export, *contexts))
            assert last.kind == Reply.ACK
        assert self.haggle(Option.GO, export_query(export))[-1].kind == Reply.ACK
        return [int.from_bytes(reply.data[:4], "big") for reply in selected]

    def simple_reply(self) -> SimpleReply:
        """Receive the head of a simple reply."""
        magic, error, cookie = SIMPLE_REPLY.unpack(self.receive(SIMPLE_REPLY.size))
        assert magic == SIMPLE_REPLY_MAGIC
        return SimpleReply(error, cookie)

    def chunk(self) -> Chunk:
        """Receive one chunk of a structured reply."""
        if self._extended:
            magic, flags, kind, cookie, offset, length = EXTENDED_CHUNK.unpack(
                self.receive(EXTENDED_CHUNK.size)
            )
            assert magic == EXTENDED_REPLY_MAGIC
            return Chunk(bool(flags & 1), kind, cookie, self.receive(length), offset)
        magic, flags, kind, cookie, length = CHUNK.unpack(self.receive(CHUNK.size))
        assert magic == STRUCTURED_REPLY_MAGIC
        return Chunk(bool(flags & 1), kind, cookie, self.receive(length))

    def chunks(self) -> list[Chunk]:
        """Receive all chunks of one structured reply, up to the one that says that it is done."""
        received = [self.chunk()]
        while not received[-1].done:
            received.append(self.chunk())
        return received
