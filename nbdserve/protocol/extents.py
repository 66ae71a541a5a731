"""Arithmetic on extents: runs of a disk that share a status. Lengths are in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

MAX_DESCRIPTOR_LENGTH = (1 << 32) - 4096
"""The longest run that one 32-bit block status descriptor tells of, kept aligned for the client's sake."""


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


def descriptors(extents: Iterable[Extent], *, limit: int) -> list[Extent]:
    """The first ``limit`` runs, joined, none longer than a 32-bit descriptor can say."""
    result: list[Extent] = []
    for extent in coalesce(extents):
        left = extent.length
        while left:
            if len(result) == limit:
                return result
            part = min(left, MAX_DESCRIPTOR_LENGTH)
            result.append(Extent(part, extent.flags))
            left -= part
    return result
