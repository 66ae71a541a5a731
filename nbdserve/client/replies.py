"""What the parts of a structured reply amount to: libnbd passes them on and does not add them up.

NBD protocol, "NBD_CMD_READ" and "Structured reply types": the chunks of a read cover each byte of it exactly
once, unless one of them is an error. A server that breaks this has sent something else than what was asked
for. That is EPROTO, which no server can send as an error of its own.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence


class Coverage:
    """Counts which bytes of one read its chunks have brought."""

    __slots__ = ("_begin", "_fault", "_length", "_marks", "_next")

    def __init__(self, offset: int, length: int) -> None:
        self._begin, self._length = offset, length
        self._next = 0
        """How many bytes have come, as long as they come in order."""
        self._marks: bytearray | None = None
        """A 1 for each byte that has come, once some did not come in order."""
        self._fault: str | None = None

    def add(self, offset: int, length: int) -> None:
        """A chunk brought these bytes, which lie within the read."""
        begin = offset - self._begin
        if length and begin == self._next and self._marks is None:
            self._next += length
        elif not length:
            self._fault = self._fault or "has an empty chunk"
        else:
            self._mark(begin, begin + length)

    def _mark(self, begin: int, end: int) -> None:
        if self._marks is None:
            self._marks = bytearray(self._length)
            self._marks[: self._next] = b"\1" * self._next
        if self._marks.find(1, begin, end) >= 0:
            self._fault = self._fault or f"has bytes at {self._begin + begin} twice"
        self._marks[begin:end] = b"\1" * (end - begin)

    def require_whole(self) -> None:
        """Raise OSError, EPROTO, unless each byte has come exactly once."""
        came = self._next if self._marks is None else self._marks.count(1)
        if self._fault is None and came != self._length:
            self._fault = f"has only {came} of them"
        if self._fault is not None:
            raise broken(f"the reply to a read of {self._length} bytes at {self._begin} {self._fault}")


def sound_status(
    replies: Sequence[Sequence[int]], offset: int, length: int, size: int, block: int
) -> list[int]:
    """Return a range's block status in one context, lengths and flags in turn.

    NBD protocol, "NBD_REPLY_TYPE_BLOCK_STATUS": one reply, in which at least one extent, none of them empty,
    only the last reaching beyond the range; else OSError, EPROTO. What follows the last whole block is left
    out, as nobody could go on asking from there. The export has ``size`` bytes, a minimum ``block``.
    """
    status = list(replies[0]) if replies else []
    lengths, fault = status[0::2], ""
    end = offset + sum(lengths)
    if len(replies) > 1:
        fault = "comes twice"
    elif not lengths:
        fault = "is empty"
    elif min(lengths) <= 0:
        fault = f"has an empty extent at {offset + sum(lengths[: lengths.index(min(lengths))])}"
    elif end - lengths[-1] >= offset + length:
        fault = "goes on behind the range"
    surplus = end % block if end < size else 0
    while surplus and status and not fault:
        last, flags = status[-2:]
        del status[-2:]
        if last > surplus:
            status += last - surplus, flags
        surplus -= min(surplus, last)
    if not status:
        fault = fault or "ends before the first block does"
    if fault:
        raise broken(f"the block status of {length} bytes at {offset} {fault}")
    return status


def broken(what: str) -> OSError:
    """Return what a server that broke the protocol makes of a request."""
    return OSError(errno.EPROTO, f"the server broke the protocol: {what}")
