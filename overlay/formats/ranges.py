"""Ranges of the disk, cut up at the tables that tell of it: chunks of bitmaps, slices of an L2 table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from overlay.formats.image import Run, State
from overlay.formats.storage import Storage


def cut(ranges: Iterable[tuple[int, int]], unit: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield the parts of ranges (offset, length) in bytes: number of a table, its first entry and the end.

    A table has ``size`` entries, and each stands for ``unit`` bytes; what a range covers in part counts. They
    come in order, and no entry twice. There may be very many ranges, while a guest stands still.
    """
    number = start = stop = reached = 0
    for offset, length in sorted(ranges):
        begin, end = offset // unit, -(-(offset + length) // unit) if length else 0
        if begin < reached:
            begin = reached
        while begin < end:
            if begin >= stop:
                number = begin // size
                start, stop = number * size, (number + 1) * size
            reached = end if end < stop else stop
            yield number, begin - start, reached - start
            begin = reached


def joined(runs: Iterable[tuple[int, int, bool, bool]]) -> Iterator[tuple[int, int, bool, bool]]:
    """Yield runs (first, end, and two properties) that follow one another, those that are alike as one."""
    pending: tuple[int, int, bool, bool] | None = None
    for run in runs:
        if pending is None:
            pending = run
        elif pending[2:] == run[2:]:
            pending = (pending[0], *run[1:])
        else:
            yield pending
            pending = run
    if pending is not None:
        yield pending


def runs_of(
    data: Storage, run: tuple[int, int, bool, bool], unit: int, offset: int, end: int, *, is_raw: bool
) -> Iterator[Run]:
    """Yield what lies within a range of a run of units (first, end, present, written), holes told from data.

    Of a raw disk nobody knows who wrote it.
    """
    first, last, present, written = run
    written &= not is_raw
    begin, stop = max(offset, first * unit), min(end, last * unit)
    if not present:
        yield Run(begin, stop - begin, State.ABSENT)
        return
    for place, length in data.data(begin, stop - begin):
        if place > begin:
            yield Run(begin, place - begin, State.ZERO, None, written)
        yield Run(place, length, State.DATA, place, written)
        begin = place + length
    if begin < stop:
        yield Run(begin, stop - begin, State.ZERO, None, written)
