"""Which absent parts of the disk are zeros in the backing: found by block status, and never fetched."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from nbdserve.client.pipeline import STATUS_LIMIT
from nbdserve.client.reconnect import Fault, fault_of
from nbdserve.protocol.constants import ExtentFlags
from nbdserve.protocol.extents import Extent
from nbdserve.protocol.offers import BASE_ALLOCATION
from overlay.backing.connections import Session
from overlay.formats.image import Image

_AHEAD = 8
"""Requests for block status under way at once: a sparse disk is looked over at the speed of the link."""
_LONGEST = 1 << 40
"""Bytes of zeros that are marked together: a pause is heard in between."""
_ZERO = int(ExtentFlags.ZERO)


def fill_zeros(image: Image, session: Session, offset: int, goes_on: Callable[[int], None]) -> None:
    """Mark as zeros what is absent from ``offset`` on and reads as zeros in the backing.

    What was asked for before the image was invalidated is not believed. ``goes_on`` is called now and then
    with how far it has come, in bytes, and may raise to end it. Raises OSError when the connection is lost,
    the server broke the protocol, or the image cannot be changed.
    """
    if not session.export.has_extents:
        return
    size = image.cluster_size
    for begin, length, asked_at in _zeros(image, session, offset):
        # What is zero only in part of a cluster is fetched with it.
        start = -(-begin // size) * size
        end = begin + length
        end = image.size if end >= session.export.size else end // size * size
        if start < end:
            image.fill_zero(start, end - start, asked_at)
        goes_on(begin + length)


def _zeros(image: Image, session: Session, offset: int) -> Iterator[tuple[int, int, int]]:
    """(offset, length) of what the backing says are zeros, joined where it can be; length 0 after data.

    The third is how many invalidations there had been when that was asked for.
    """
    begin = end = offset
    since = image.invalidations
    for position, extent, asked_at in _survey(image, session, offset):
        is_zero = extent.flags & _ZERO
        is_next = position == end and asked_at == since
        if end > begin and (not is_zero or not is_next or end - begin >= _LONGEST):
            yield begin, end - begin, since
            begin = end
        if not is_next or not is_zero:
            begin = position if is_zero else position + extent.length
        end, since = position + extent.length, asked_at
        if not is_zero:
            yield end, 0, since
    if end > begin:
        yield begin, end - begin, since


def _survey(image: Image, session: Session, offset: int) -> Iterator[tuple[int, Extent, int]]:
    """What the backing says of each absent range, in order, asked for some way ahead."""
    asked: deque[tuple[int, tuple[int, int, Future[list[Extent]]]]] = deque()

    def told() -> Iterator[tuple[int, Extent, int]]:
        asked_at, question = asked.popleft()
        for position, extent in _told(session, *question):
            yield position, extent, asked_at

    for begin, length in _absent(image, offset, session.export.size):
        asked.append((image.invalidations, (begin, length, _ask(session, begin, length))))
        if len(asked) == _AHEAD:
            yield from told()
    while asked:
        yield from told()


def _absent(image: Image, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of what is absent, as far as the backing goes, in pieces to ask for."""
    for start, length in image.absent(offset, max(0, min(size, image.size) - offset)):
        for begin in range(start, start + length, STATUS_LIMIT):
            yield begin, min(STATUS_LIMIT, start + length - begin)


def _told(
    session: Session, offset: int, length: int, future: Future[list[Extent]]
) -> Iterator[tuple[int, Extent]]:
    """The answer for one range, asked for again from where a reply ended too early."""
    end = offset + length
    while True:
        try:
            extents = future.result()
        except OSError as error:
            if fault_of(error) is not Fault.REQUEST:
                raise
            return  # a server that cannot tell: it is fetched, and zeros are found then
        for extent in extents:
            part = min(extent.length, end - offset)
            if part > 0:
                yield offset, Extent(part, extent.flags)
                offset += part
        if offset >= end:
            return
        future = _ask(session, offset, end - offset)


def _ask(session: Session, offset: int, length: int) -> Future[list[Extent]]:
    return session.bulk().start_extents(offset, length, BASE_ALLOCATION)
