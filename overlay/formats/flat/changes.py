"""What a map's file lacks, as it was at one instant: stored once the data that its bits tell of is durable.

Grains that become absent in between are taken out, so that what is stored late makes nothing present again.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence

from overlay.formats.flat.header import PAIR_BYTES


class Pair:
    """The bitmaps of a chunk."""

    __slots__ = ("present", "written")

    def __init__(self, present: bytearray, written: bytearray) -> None:
        self.present = present
        self.written = written

    @classmethod
    def read(cls, counts: Sequence[int], raw: bytes, full: int) -> Pair:
        """Return those of a chunk of ``full`` grains: what its counts say of them, and the file's bitmaps."""
        half = len(raw) // 2
        present = _bitmap(counts[0], raw[:half], full)
        # A power cut may have left one without the other.
        written = _bitmap(counts[1], raw[half:], full) & present
        return cls(bytearray(present.to_bytes(half, "little")), bytearray(written.to_bytes(half, "little")))

    @property
    def counts(self) -> tuple[int, int]:
        """Tell how many grains are present, and how many of them were written."""
        present, written = (int.from_bytes(each, "little") for each in (self.present, self.written))
        return present.bit_count(), written.bit_count()

    def keep(self, mask: int) -> None:
        """Let the grains be absent whose bit the mask does not have."""
        for bitmap in (self.present, self.written):
            bitmap[:] = (int.from_bytes(bitmap, "little") & mask).to_bytes(len(bitmap), "little")

    def copy(self) -> Pair:
        """Return the bitmaps as they are now."""
        return Pair(self.present[:], self.written[:])

    def pack(self) -> bytes:
        """Return them as they lie in the file."""
        return bytes(self.present + self.written)


class Changes:
    """Bitmaps and entries of the directory. Whoever calls holds the grains' lock, or is the only user."""

    def __init__(self, entries: dict[int, tuple[int, int]], pairs: dict[int, Pair]) -> None:
        """``entries`` are in the order of the chunks; ``pairs`` are of those of them that need bitmaps."""
        self.chunks = frozenset(entries)
        self.pairs = pairs
        self.has_stored_pairs = False
        """Whether the bitmaps are in the file, though the directory does not tell of them yet."""
        self.runs: list[tuple[int, array[int]]] = []
        """Of the directory: number of the first chunk, entries of it and of those that follow."""
        expected = -1
        for chunk, entry in entries.items():
            if chunk != expected:
                self.runs.append((chunk, array("H")))
            self.runs[-1][1].extend(entry)
            expected = chunk + 1

    def entry(self, chunk: int) -> array[int]:
        """Return the two counts of a chunk."""
        first, entries = self._run_of(chunk)
        return entries[2 * (chunk - first) : 2 * (chunk - first) + 2]

    def keep(self, chunk: int, mask: int, full: int) -> None:
        """Take grains of one of the chunks out: those whose bit the mask does not have."""
        entry = self.entry(chunk)
        if not entry[0]:
            return
        pair = self.pairs.get(chunk)
        if pair is None:
            # Its counts are none and all: these need no bitmaps, until now.
            pair = self.pairs[chunk] = Pair.read(entry, bytes(PAIR_BYTES), full)
        pair.keep(mask)
        first, entries = self._run_of(chunk)
        entries[2 * (chunk - first) : 2 * (chunk - first) + 2] = array("H", pair.counts)

    def _run_of(self, chunk: int) -> tuple[int, array[int]]:
        return self.runs[bisect_right(self.runs, chunk, key=lambda run: run[0]) - 1]


def _bitmap(count: int, raw: bytes, full: int) -> int:
    """The bitmap of a chunk of ``full`` grains whose directory entry says ``count``."""
    if not count:
        return 0
    value = (1 << full) - 1
    return value if count == full else value & int.from_bytes(raw, "little")
