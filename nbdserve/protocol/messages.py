"""Requests and replies of the transmission phase (proto.md, "Transmission phase"), and their checks.

request           magic32 flags16 type16 cookie64 offset64 length32 [payload of WRITE]
simple reply      magic32 error32 cookie64 [data of READ]
structured chunk  magic32 flags16 type16 cookie64 length32 payload
  OFFSET_DATA       offset64 data
  OFFSET_HOLE       offset64 length32
  BLOCK_STATUS      context32 (length32 flags32)...
  ERROR             error32 length16 message
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from typing import Final

from nbdserve.protocol.constants import (
    MAX_STRING,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlags,
    NbdError,
    ReplyFlags,
    ReplyType,
    TransmissionFlags,
)
from nbdserve.protocol.offers import Agreement

REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
DATA_CHUNK = struct.Struct(">IHHQIQ")
"""The head of an OFFSET_DATA chunk: a chunk header and the offset that comes before the data."""

_CONTEXT_ID = struct.Struct(">I")
_DESCRIPTOR = struct.Struct(">II")
_ERROR_HEAD = struct.Struct(">IH")

_FUA = int(CommandFlags.FUA)

ALLOWED_FLAGS: Final = {
    Command.READ: _FUA | CommandFlags.DF,
    Command.WRITE: _FUA,
    Command.DISC: _FUA,
    Command.FLUSH: _FUA,
    Command.TRIM: _FUA,
    Command.CACHE: _FUA,
    Command.WRITE_ZEROES: _FUA | CommandFlags.NO_HOLE | CommandFlags.FAST_ZERO,
    Command.BLOCK_STATUS: _FUA | CommandFlags.REQ_ONE,
}
"""The flags each command may carry; FUA is harmless on any (proto.md, "Command flags")."""

_CHANGING: Final = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)

_WIRE_ERRORS: Final = {
    errno.EPERM: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.EINVAL: NbdError.EINVAL,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.EOVERFLOW: NbdError.EOVERFLOW,
    errno.ENOTSUP: NbdError.ENOTSUP,
    errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}


def wire_error(number: int | None) -> NbdError:
    """Map an errno to the error value that goes over the wire; EIO where the protocol has no word for it."""
    return _WIRE_ERRORS.get(number or 0, NbdError.EIO)


def refusal(
    agreement: Agreement, command: int, flags: int, offset: int, length: int
) -> tuple[NbdError, str] | None:
    """Say why a request cannot be served as asked, as an error and a sentence; None when it can.

    ``offset`` and ``length`` are in bytes, as the client sent them. Does not look at payload bytes.
    """
    allowed = ALLOWED_FLAGS.get(command)  # type: ignore[call-overload]
    if allowed is None:
        return NbdError.EINVAL, f"request type {command} is not known here"
    if flags & ~allowed or (flags & CommandFlags.DF and not agreement.structured):
        return NbdError.EINVAL, f"flags {flags:#x} do not fit request type {command}"
    if command == Command.FLUSH:
        return None
    offer = agreement.offer
    if command in _CHANGING and offer.flags & TransmissionFlags.READ_ONLY:
        return NbdError.EPERM, "the export is read-only"
    if command in (Command.READ, Command.WRITE) and length > offer.block_sizes.maximum:
        return NbdError.EINVAL, f"{length} bytes are more than one request may carry"
    if offset + length > offer.size:
        past_end = NbdError.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else NbdError.EINVAL
        return past_end, f"the request ends at {offset + length}, the export at {offer.size}"
    if command == Command.BLOCK_STATUS and (not agreement.contexts or not length):
        return NbdError.EINVAL, "block status needs a negotiated meta context and a length"
    needed = _NEEDED_FLAG.get(command)
    if needed is not None and not offer.flags & needed:
        return NbdError.EINVAL, f"request type {command} was not advertised"
    if flags & CommandFlags.FAST_ZERO and not offer.flags & TransmissionFlags.SEND_FAST_ZERO:
        return NbdError.EINVAL, "fast zeroes were not advertised"
    return None


_NEEDED_FLAG: Final[dict[int, TransmissionFlags]] = {
    Command.TRIM: TransmissionFlags.SEND_TRIM,
    Command.CACHE: TransmissionFlags.SEND_CACHE,
    Command.WRITE_ZEROES: TransmissionFlags.SEND_WRITE_ZEROES,
}


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A simple reply without data."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def chunk(cookie: int, kind: ReplyType, payload: bytes = b"", *, done: bool = True) -> bytes:
    """One structured reply chunk."""
    flags = ReplyFlags.DONE if done else 0
    return CHUNK.pack(STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(payload)) + payload


def error_reply(agreement: Agreement, cookie: int, error: NbdError, message: str) -> bytes:
    """The last reply to a request that failed: a chunk with a message where structured replies are agreed."""
    if not agreement.structured:
        return simple_reply(cookie, error)
    text = message.encode()[:MAX_STRING]
    return chunk(cookie, ReplyType.ERROR, _ERROR_HEAD.pack(error, len(text)) + text)


def block_status(cookie: int, context: int, extents: Sequence[tuple[int, int]], *, done: bool) -> bytes:
    """A BLOCK_STATUS chunk: ``extents`` are pairs of length in bytes (below 2^32) and status flags."""
    payload = b"".join((_CONTEXT_ID.pack(context), *(_DESCRIPTOR.pack(*extent) for extent in extents)))
    return chunk(cookie, ReplyType.BLOCK_STATUS, payload, done=done)
