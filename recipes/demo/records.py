"""Where the guest's records lie on its disks. ``init``, the guest's program, computes the same in shell.

A disk is divided into cells of 128 KiB that begin in the middle of a 64 KiB cluster; each holds one place.
Record N goes to cell N * STRIDE modulo the number of cells: a bijection, so no place comes back before all
have had their turn, and then the newer record simply replaces the older one, which has the same extent.
Every eighth record replaces an earlier one at once: that of half its number.

Of several disks record N is on that of number N modulo the number of disks; one that replaces another goes
where that was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from nbdserve.common.errors import UsageError

SECTOR = 512
CLUSTER = 128  # sectors, as are the next three
CELL = 2 * CLUSTER
ORIGIN = CLUSTER // 2
STRIDE = 5003

# First sector within the cell, and number of sectors; the cell's number modulo 8 says which.
SHAPES = (
    (64, 8),  # 4 KiB at the start of a cluster
    (61, 6),  # 3 KiB across a cluster boundary
    (17, 1),  # a single sector
    (184, 16),  # 8 KiB across a cluster boundary
    (131, 3),  # 1.5 KiB, not aligned to 4 KiB
    (64, 128),  # a whole cluster, of zeroes
    (24, 8),  # 4 KiB inside a cluster
    (40, 64),  # 32 KiB across a cluster boundary
)


@dataclass(frozen=True)
class Place:
    """Where a record lies: its cell, its first sector on the disk, and how many sectors it has."""

    cell: int
    first: int
    count: int

    @property
    def offset(self) -> int:
        """First byte on the disk."""
        return self.first * SECTOR

    @property
    def length(self) -> int:
        """Size in bytes."""
        return self.count * SECTOR


def cells_on(size: int) -> int:
    """Return how many cells a disk of ``size`` bytes has; UsageError if it has none, or no bijection
    exists.
    """
    cells = size // (CELL * SECTOR) - 1
    if size % SECTOR or cells < 1 or gcd(cells, STRIDE) != 1:
        raise UsageError(f"a disk of {size} bytes does not suit the guest; take a power of two from 1 MiB up")
    return cells


def place(number: int, cells: int) -> Place:
    """Return the place of record ``number``, counted from 1, on a disk with so many cells."""
    cell = _rank(number) * STRIDE % cells
    first, count = SHAPES[cell % 8]
    return Place(cell, ORIGIN + CELL * cell + first, count)


def disk_of(number: int, disks: int) -> int:
    """Return on which of so many disks record ``number`` is, counted from 0."""
    return _rank(number) % disks


def _rank(number: int) -> int:
    """Return the number of the record whose place this one has."""
    return number if number % 8 else number // 2


def newest(written: int, cells: int, disk: int = 0, disks: int = 1) -> dict[Place, int]:
    """Return every place of a disk that records 1 to ``written`` have used, and the number of the last record
    in each.
    """
    numbers = (number for number in range(1, written + 1) if disk_of(number, disks) == disk)
    return {place(number, cells): number for number in numbers}


def extents(written: int, cells: int, disk: int = 0, disks: int = 1) -> Iterator[tuple[int, int]]:
    """Offset and length in bytes of what records 1 to ``written`` cover on a disk, ascending, without
    overlaps.
    """
    for each in sorted(newest(written, cells, disk, disks), key=lambda each: each.first):
        yield each.offset, each.length
