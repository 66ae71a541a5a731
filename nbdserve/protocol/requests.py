"""Which requests can be served as asked, and errno as it goes over the wire (proto.md, "Transmission")."""

from __future__ import annotations

import errno
import struct
from typing import Final

from nbdserve.protocol.constants import Command, CommandFlags, NbdError, TransmissionFlags
from nbdserve.protocol.framing import Request
from nbdserve.protocol.offers import Agreement, Mode

# Plain numbers: ``~`` of an enumeration's member knows nothing of the bits that have no name.
_FUA = int(CommandFlags.FUA)
_PAYLOAD_LEN = int(CommandFlags.PAYLOAD_LEN)

ALLOWED_FLAGS: Final[dict[int, int]] = {
    Command.READ: _FUA | int(CommandFlags.DF),
    Command.WRITE: _FUA,
    Command.DISC: _FUA,
    Command.FLUSH: _FUA,
    Command.TRIM: _FUA,
    Command.CACHE: _FUA,
    Command.WRITE_ZEROES: _FUA | int(CommandFlags.NO_HOLE) | int(CommandFlags.FAST_ZERO),
    Command.BLOCK_STATUS: _FUA | int(CommandFlags.REQ_ONE),
}
"""The flags each command may carry; FUA is harmless on any (proto.md, "Command flags")."""

CHANGING: Final = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
"""The commands that change what the disk holds."""

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


def without_payload(request: Request) -> Request:
    """Return the request as if no payload had been announced; all its other flags stay, named or not."""
    return request._replace(flags=request.flags & ~_PAYLOAD_LEN)


def refusal(agreement: Agreement, request: Request) -> tuple[NbdError, str] | None:
    """Say why a request cannot be served as asked, as an error and a sentence; None when it can.

    Payloads have been dealt with: ``request.length`` is what the request affects, and PAYLOAD_LEN is not set
    unless it does not belong there.
    """
    flags, command, _, offset, length = request
    offer = agreement.offer
    if command not in ALLOWED_FLAGS:
        return NbdError.EINVAL, f"request type {command} is not known here"
    if flags & ~ALLOWED_FLAGS[command] or (flags & CommandFlags.DF and agreement.mode is Mode.SIMPLE):
        return NbdError.EINVAL, f"flags {flags:#x} do not fit request type {command}"
    if command == Command.FLUSH:
        return None
    if command in CHANGING and offer.flags & TransmissionFlags.READ_ONLY:
        return NbdError.EPERM, "the export is read-only"
    if command in (Command.READ, Command.WRITE) and length > offer.block_sizes.maximum:
        # EOVERFLOW is for what could have been sent in chunks (proto.md, "Error values").
        chunked = command == Command.READ and agreement.mode is not Mode.SIMPLE
        error = NbdError.EOVERFLOW if chunked else NbdError.EINVAL
        return error, f"{length} bytes are more than one request may carry"
    if offset + length > offer.size:
        past_end = NbdError.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else NbdError.EINVAL
        return past_end, f"the request ends at {offset + length}, the export at {offer.size}"
    minimum = offer.block_sizes.minimum
    # The last block of an odd size could not be reached otherwise.
    if offset % minimum or (length % minimum and offset + length < offer.size):
        return NbdError.EINVAL, f"offset {offset} and length {length} are no multiples of {minimum}"
    if command == Command.BLOCK_STATUS and not (agreement.contexts and length):
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


def choose_contexts(
    agreement: Agreement, request: Request, payload: bytes
) -> tuple[Request, tuple[tuple[int, str], ...]] | None:
    """Read the payload of a BLOCK_STATUS request: what it affects, and the contexts that it asks for.

    The layout is ``length64 context32...`` (extension "Extended headers"). None when the payload does not
    belong to the request, is malformed, or names a context twice or one that was not negotiated.
    """
    if request.command != Command.BLOCK_STATUS or len(payload) < 12 or len(payload) % 4:
        return None
    length, *wanted = struct.unpack(f">Q{(len(payload) - 8) // 4}I", payload)
    known = dict(agreement.contexts)
    if len(set(wanted)) < len(wanted) or not set(wanted) <= set(known):
        return None
    plain = without_payload(request)._replace(length=length)
    return plain, tuple((number, known[number]) for number in wanted)
