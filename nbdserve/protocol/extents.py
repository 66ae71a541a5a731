"""Arithmetic on extents: runs of a disk that share a status. Lengths are in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Extent(NamedTuple):
    """A run of ``length`` bytes with the status ``flags`` of its meta context."""

    length: int
    flags: int


def coalesce(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours of equal status and drop empty runs."""
    pending: Extent | None = None
    for extent in extents:
        if not extent.length:
            continue
        if pending is not None and pending.flags == extent.flags:
            pending = Extent(pending.length + extent.length, extent.flags)
        else:
            if pending is not None:
                yield pending
            pending = extent
    if pending is not None:
        yield pending


def descriptors(extents: Iterable[Extent], *, limit: int, longest: int) -> list[Extent]:
    """Return the first ``limit`` runs, joined, none of more than ``longest`` bytes."""
    result: list[Extent] = []
    for extent in coalesce(extents):
        left = extent.length
        while left:
            if len(result) == limit:
                return result
            part = min(left, longest)
            result.append(Extent(part, extent.flags))
            left -= part
    return result
