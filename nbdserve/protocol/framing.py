"""How requests and replies look on the wire, in the three ways that haggling can agree on.

    compact request    magic32 flags16 type16 cookie64 offset64 length32 [payload]
    extended request   magic32 flags16 type16 cookie64 offset64 length64 [payload]

    simple reply       magic32 error32 cookie64 [data]
    structured chunk   magic32 flags16 type16 cookie64 length32 payload
    extended chunk     magic32 flags16 type16 cookie64 offset64 length64 payload     (the request's offset)

    OFFSET_DATA        offset64 data
    OFFSET_HOLE        offset64 length32
    BLOCK_STATUS       context32 (length32 flags32)...
    BLOCK_STATUS_EXT   context32 count32 (length64 flags64)...
    ERROR              error32 length16 message

See proto.md, "Transmission", "Structured replies", and the extension "Extended headers".
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from nbdserve.protocol.constants import (
    EXTENDED_REPLY_MAGIC,
    EXTENDED_REQUEST_MAGIC,
    MAX_STRING,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    NbdError,
    ReplyFlags,
    ReplyType,
)
from nbdserve.protocol.extents import Extent
from nbdserve.protocol.offers import Agreement, Mode

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_COMPACT_REQUEST = struct.Struct(">IHHQQI")
_EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
_SIMPLE = struct.Struct(">IIQ")
_CHUNK = struct.Struct(">IHHQI")
_DATA_CHUNK = struct.Struct(">IHHQIQ")
_EXTENDED_CHUNK = struct.Struct(">IHHQQQ")
_EXTENDED_DATA_CHUNK = struct.Struct(">IHHQQQQ")
_HOLE = struct.Struct(">QI")
_CONTEXT = struct.Struct(">I")
_DESCRIPTOR = struct.Struct(">II")
_EXTENDED_CONTEXT = struct.Struct(">II")
_EXTENDED_DESCRIPTOR = struct.Struct(">QQ")
_ERROR = struct.Struct(">IH")

_NONE = int(ReplyType.NONE)
_DATA = int(ReplyType.OFFSET_DATA)
_DONE = int(ReplyFlags.DONE)


class Request(NamedTuple):
    """A request as it came, in the order of its fields; offset and length are in bytes."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class Framing(ABC):
    """One way of framing. ``data_head`` is the number of bytes before the data in the reply to a read."""

    request: ClassVar[struct.Struct] = _COMPACT_REQUEST
    request_magic: ClassVar[int] = REQUEST_MAGIC
    data_head: ClassVar[int]
    success_head: ClassVar[int]
    pieces: ClassVar[bool] = True
    """Whether the reply to a read may come in several chunks, of which the last may be an error."""
    longest_extent: ClassVar[int] = (1 << 32) - 4096
    """The longest extent that one descriptor can tell of, in bytes, kept aligned for the client's sake."""

    @staticmethod
    @abstractmethod
    def put_data_head(
        out: WriteableBuffer, start: int, cookie: int, asked: int, offset: int, length: int, done: int = _DONE
    ) -> None:
        """Put the head of ``length`` bytes of data at ``offset`` into ``out``, for a request at ``asked``."""

    @staticmethod
    @abstractmethod
    def put_success(out: WriteableBuffer, start: int, cookie: int, asked: int) -> None:
        """Put ``success_head`` bytes that say that a request at ``asked`` succeeded into ``out``."""

    @abstractmethod
    def success(self, request: Request) -> bytes:
        """Return the reply to a request that succeeded and returns no data."""

    @abstractmethod
    def error(self, request: Request, error: NbdError, message: str) -> bytes:
        """Return the last, or only, reply to a request that failed."""

    @abstractmethod
    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """Return a run of zeroes in the reply to a read, without the zeroes."""

    @abstractmethod
    def block_status(self, request: Request, context: int, extents: Sequence[Extent], *, done: bool) -> bytes:
        """Return the extents of one meta context."""


class SimpleFraming(Framing):
    """What every client understands. An error can be told only instead of the data."""

    data_head = _SIMPLE.size
    success_head = _SIMPLE.size
    pieces = False

    @staticmethod
    def put_data_head(
        out: WriteableBuffer, start: int, cookie: int, asked: int, offset: int, length: int, done: int = _DONE
    ) -> None:
        """Put the head of a simple reply; it tells nothing of offset and length."""
        _SIMPLE.pack_into(out, start, SIMPLE_REPLY_MAGIC, 0, cookie)

    @staticmethod
    def put_success(out: WriteableBuffer, start: int, cookie: int, asked: int) -> None:
        """Put a simple reply without an error."""
        _SIMPLE.pack_into(out, start, SIMPLE_REPLY_MAGIC, 0, cookie)

    def success(self, request: Request) -> bytes:
        """Return a simple reply without an error."""
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def error(self, request: Request, error: NbdError, message: str) -> bytes:
        """Return a simple reply with an error; there is no room for the message."""
        return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, error, request.cookie)

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """Refuse: simple replies have none."""
        raise NotImplementedError("simple replies have no holes")

    def block_status(self, request: Request, context: int, extents: Sequence[Extent], *, done: bool) -> bytes:
        """Refuse: simple replies have none."""
        raise NotImplementedError("simple replies have no block status")


class StructuredFraming(Framing):
    """Structured replies: reads in chunks, errors with a message, block status."""

    data_head = _DATA_CHUNK.size
    success_head = _CHUNK.size

    @staticmethod
    def put_data_head(
        out: WriteableBuffer, start: int, cookie: int, asked: int, offset: int, length: int, done: int = _DONE
    ) -> None:
        """Put the head of an OFFSET_DATA chunk, with the offset that comes before the data."""
        _DATA_CHUNK.pack_into(out, start, STRUCTURED_REPLY_MAGIC, done, _DATA, cookie, length + 8, offset)

    @staticmethod
    def put_success(out: WriteableBuffer, start: int, cookie: int, asked: int) -> None:
        """Put a chunk without content that ends the reply."""
        _CHUNK.pack_into(out, start, STRUCTURED_REPLY_MAGIC, _DONE, _NONE, cookie, 0)

    def _chunk(self, request: Request, kind: ReplyType, payload: bytes = b"", *, done: bool = True) -> bytes:
        flags = _DONE if done else 0
        head = _CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, request.cookie, len(payload))
        return head + payload

    def success(self, request: Request) -> bytes:
        """Return a chunk that only says that all is done."""
        return self._chunk(request, ReplyType.NONE)

    def error(self, request: Request, error: NbdError, message: str) -> bytes:
        """Return an error with a sentence about it."""
        text = message.encode()[:MAX_STRING]
        return self._chunk(request, ReplyType.ERROR, _ERROR.pack(error, len(text)) + text)

    def hole(self, request: Request, offset: int, length: int, *, done: bool) -> bytes:
        """Return an OFFSET_HOLE chunk; ``length`` is below 4 GiB."""
        return self._chunk(request, ReplyType.OFFSET_HOLE, _HOLE.pack(offset, length), done=done)

    def block_status(self, request: Request, context: int, extents: Sequence[Extent], *, done: bool) -> bytes:
        """Return a BLOCK_STATUS chunk with 32-bit lengths."""
        payload = b"".join((_CONTEXT.pack(context), *(_DESCRIPTOR.pack(*extent) for extent in extents)))
        return self._chunk(request, ReplyType.BLOCK_STATUS, payload, done=done)


class ExtendedFraming(StructuredFraming):
    """Extended headers: structured replies with 64-bit lengths, each with its request's offset."""

    request = _EXTENDED_REQUEST
    request_magic = EXTENDED_REQUEST_MAGIC
    data_head = _EXTENDED_DATA_CHUNK.size
    success_head = _EXTENDED_CHUNK.size
    longest_extent = (1 << 63) - 4096

    @staticmethod
    def put_data_head(
        out: WriteableBuffer, start: int, cookie: int, asked: int, offset: int, length: int, done: int = _DONE
    ) -> None:
        """Put the head of an extended OFFSET_DATA chunk, with the offset that comes before the data."""
        _EXTENDED_DATA_CHUNK.pack_into(
            out, start, EXTENDED_REPLY_MAGIC, done, _DATA, cookie, asked, length + 8, offset
        )

    @staticmethod
    def put_success(out: WriteableBuffer, start: int, cookie: int, asked: int) -> None:
        """Put an extended chunk without content that ends the reply."""
        _EXTENDED_CHUNK.pack_into(out, start, EXTENDED_REPLY_MAGIC, _DONE, _NONE, cookie, asked, 0)

    def _chunk(self, request: Request, kind: ReplyType, payload: bytes = b"", *, done: bool = True) -> bytes:
        flags = _DONE if done else 0
        return (
            _EXTENDED_CHUNK.pack(
                EXTENDED_REPLY_MAGIC, flags, kind, request.cookie, request.offset, len(payload)
            )
            + payload
        )

    def block_status(self, request: Request, context: int, extents: Sequence[Extent], *, done: bool) -> bytes:
        """Return a BLOCK_STATUS_EXT chunk with 64-bit lengths."""
        head = _EXTENDED_CONTEXT.pack(context, len(extents))
        payload = b"".join((head, *(_EXTENDED_DESCRIPTOR.pack(*extent) for extent in extents)))
        return self._chunk(request, ReplyType.BLOCK_STATUS_EXT, payload, done=done)


def framing_of(agreement: Agreement) -> Framing:
    """Return the framing that was agreed on."""
    if agreement.mode is Mode.SIMPLE:
        return SimpleFraming()
    return StructuredFraming() if agreement.mode is Mode.STRUCTURED else ExtendedFraming()
