"""What has changed on a disk: a dirty bitmap, read from a server that exports it.

QEMU offers a node's dirty bitmap NAME as the meta context ``qemu:dirty-bitmap:NAME`` of an NBD export (QEMU's
docs/interop/nbd.txt); bit 0 of an extent's flags says that it is dirty.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate, compress

from nbdserve.client import Client, Target, connect
from nbdserve.client.pipeline import STATUS_LIMIT
from nbdserve.common.errors import ConnectError

CONTEXT = "qemu:dirty-bitmap:"
"""What the context of a bitmap begins with; its name follows."""
_AHEAD = 64
"""Questions that are under way at once: replies are short where little is dirty."""
_LIMIT = 10.0
"""Seconds for which the server may be silent: the guest stands still meanwhile."""

Ranges = list[tuple[int, int]]
"""Offsets and lengths in bytes."""


@dataclass(frozen=True)
class DirtyRanges:
    """What a bitmap says of a disk of ``size`` bytes, from some place on.

    ranges  what is dirty, in order
    end     where the next dirty range begins that was not told; None where all were
    """

    size: int
    ranges: Ranges
    end: int | None


def read_dirty_bitmap(uri: Target, name: str, start: int = 0, most: int | None = None) -> DirtyRanges:
    """Return what the bitmap of this name says is dirty from ``start`` on: ``most`` ranges of it, or all.

    Raises ConnectError where the server cannot be asked for it, OSError when it does not answer.
    """
    context = CONTEXT + name
    with connect(uri, timeout=_LIMIT, silence=_LIMIT, contexts=(context,)) as client:
        if context not in client.export.contexts:
            raise ConnectError(f"{uri}: no dirty bitmap {name} is exported there; is its name right?")
        found = _dirty(client, context, start, most)
        if most is None or len(found) <= most:
            return DirtyRanges(client.size, found, None)
        return DirtyRanges(client.size, found[:most], found[most][0])


def _dirty(client: Client, context: str, start: int, most: int | None) -> Ranges:
    """The dirty ranges, asked for in parts and some way ahead; no further part once there are more than
    ``most``.
    """
    found: Ranges = []
    asked: deque[tuple[int, int, Future[list[int]]]] = deque()
    for offset in range(start, client.size, STATUS_LIMIT):
        if len(asked) == _AHEAD:
            found += _told(client, context, *asked.popleft())
            if most is not None and len(found) > most:
                return found
        length = min(STATUS_LIMIT, client.size - offset)
        asked.append((offset, length, client.start_status(offset, length, context)))
    while asked:
        found += _told(client, context, *asked.popleft())
    return found


def _told(client: Client, context: str, offset: int, length: int, future: Future[list[int]]) -> Ranges:
    """What one answer says, asked for again from where a reply ended too early."""
    found: Ranges = []
    end = offset + length
    while True:
        status = future.result()
        lengths, flags = status[0::2], status[1::2]
        # There may be very many, while a guest waits.
        found += compress(zip(accumulate(lengths, initial=offset), lengths, strict=False), flags)
        offset += sum(lengths)
        if offset >= end:
            break
        future = client.start_status(offset, end - offset, context)
    if found:
        # The last may go on behind what was asked for: that is told once more.
        place, part = found[-1]
        found[-1] = (place, min(part, end - place))
    return found
