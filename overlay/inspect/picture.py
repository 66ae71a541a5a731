"""A disk as a picture: which parts of it are here, which the guest wrote, which are zeros, which are absent.

The disk is cut into as many equal blocks as there is room for, from left to right and from top to bottom. A
block that holds several kinds is drawn in a mixture of their colours, so that nothing is too small to leave a
trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from overlay.formats.image import Image, State

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""


class Kind(Enum):
    """What there is to see, with its name, its colour, and what that is in a terminal that has but a few."""

    COPIED = ("copied", (0x1F, 0x6F, 0xB5), "blue")
    WRITTEN = ("written by the guest", (0xE6, 0x7E, 0x22), "red")
    ZERO = ("zeros", (0x9F, 0xD8, 0xB4), "green")
    ABSENT = ("absent", (0xD8, 0xDC, 0xE3), "white")

    def __init__(self, label: str, colour: Colour, name: str) -> None:
        self.label = label
        self.colour = colour
        self.name_of_colour = name


_KINDS = tuple(Kind)
_SMALLEST = 4096
_LEAST_SHARE = 0.6
"""How much of its block's colour a kind has at least, however little of the block it is."""


@dataclass(frozen=True)
class Survey:
    """A disk, looked over for a picture."""

    size: int
    block: int
    """Bytes that a block stands for; the last may be shorter."""
    shares: list[tuple[int, int, int, int]]
    """Of each block the bytes of each Kind, in their order."""
    totals: dict[Kind, int]
    """Bytes of the disk."""
    knows_writer: bool
    """Whether the image tells what was copied from what the guest wrote."""

    @property
    def labels(self) -> dict[Kind, str]:
        """Return the kinds that can be there, and what to call them."""
        if self.knows_writer:
            return {kind: kind.label for kind in Kind}
        return {Kind.COPIED: "copied or written", Kind.ZERO: Kind.ZERO.label, Kind.ABSENT: Kind.ABSENT.label}


def survey(image: Image, blocks: int) -> Survey:
    """Look a disk over for at most so many blocks; the length of each is a power of two, 4 KiB or more."""
    size = image.size
    block = _SMALLEST
    while -(-size // block) > blocks:
        block *= 2
    shares = [[0, 0, 0, 0] for _ in range(-(-size // block))]
    totals = dict.fromkeys(Kind, 0)
    for kind, offset, length in _kinds(image):
        totals[kind] += length
        _add(shares, block, _KINDS.index(kind), offset, length)
    by_kind = [(each[0], each[1], each[2], each[3]) for each in shares]
    return Survey(size, block, by_kind, totals, image.is_written_certain)


def colour_of(share: tuple[int, int, int, int]) -> Colour:
    """Return the colour of a block: the mean of its kinds' colours, in which each counts for something."""
    weights = [0.0] * len(_KINDS)
    total = sum(share)
    for number, length in enumerate(share):
        if length == total:
            return _KINDS[number].colour
        if length:
            weights[number] = max(length / total, _LEAST_SHARE)
    whole = sum(weights)
    red, green, blue = (
        round(sum(weight * kind.colour[part] for weight, kind in zip(weights, _KINDS, strict=True)) / whole)
        for part in range(3)
    )
    return red, green, blue


def leading_kind(share: tuple[int, int, int, int]) -> Kind:
    """Tell what a block is where colours cannot be mixed: written if any is, else what most of it is."""
    written = share[_KINDS.index(Kind.WRITTEN)]
    return Kind.WRITTEN if written else _KINDS[share.index(max(share))]


def _kinds(image: Image) -> Iterator[tuple[Kind, int, int]]:
    """(kind, offset, length) of the whole disk."""
    has_backing, is_certain = bool(image.backings), image.is_written_certain
    for run in image.runs(0, image.size):
        if run.state is State.ABSENT:
            # Without a backing what is absent reads as zeros.
            kind = Kind.ABSENT if has_backing else Kind.ZERO
        elif run.written and is_certain:
            kind = Kind.WRITTEN
        else:
            kind = Kind.COPIED if run.state is State.DATA else Kind.ZERO
        yield kind, run.offset, run.length


def _add(shares: list[list[int]], block: int, kind: int, offset: int, length: int) -> None:
    end = offset + length
    first, last = offset // block, (end - 1) // block
    if first == last:
        shares[first][kind] += length
        return
    shares[first][kind] += (first + 1) * block - offset
    for number in range(first + 1, last):
        shares[number][kind] += block
    shares[last][kind] += end - last * block
