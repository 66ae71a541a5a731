"""The consistency check of a QED image (QED spec, "Consistency checking"), and its repair.

Every cluster after the header is referenced exactly once: by an L1 entry (an L2 table), by an L2 entry
(data), or as part of the L1 table. One without a reference is leaked: wasted, but harmless. All else is a
corruption.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from overlay.formats.qed.header import ENTRY_BYTES, Feature, Header, write_header
from overlay.formats.qed.tables import SLICE_ENTRIES, ZERO, encode, read_entries
from overlay.formats.storage import Storage

PROBLEMS_SHOWN = 50
_NO_ENTRIES = bytes(SLICE_ENTRIES * ENTRY_BYTES)


@dataclass(slots=True)
class Report:
    """What a check found. Clusters are counted as ``qemu-img check`` counts them."""

    total_clusters: int
    """Clusters of the guest's disk."""
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    """Allocated clusters that do not follow their predecessor in the file."""
    corruptions: int = 0
    """References that are wrong and were left so."""
    leaks: int = 0
    """Clusters of the file that nothing refers to, and that were left there."""
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    needs_check: bool = False
    """The image was not closed cleanly, and is still marked so."""
    problems: list[str] = field(default_factory=list)
    """A line for each corruption, fixed or not, up to PROBLEMS_SHOWN."""


def check(storage: Storage, header: Header, *, repair: bool = False) -> Report:
    """Check all references. Raises OSError if the file cannot be read.

    ``repair`` clears references to what is no cluster of the file (that part of the disk then comes from the
    backing), cuts leaked clusters off the file's end, and clears NEED_CHECK if no corruption is left. Two
    references to one cluster are left: nobody knows to whom the data belongs.
    """
    return _Check(storage, header, repair).run()


class _Clusters:
    """A set of cluster numbers that takes memory for what is in it, not for what could be."""

    _BITS = 1024

    def __init__(self) -> None:
        self._chunks: dict[int, int] = {}
        self.count = 0
        self.end = 0
        """One more than the highest number."""

    def add(self, first: int, count: int) -> int:
        """Add consecutive numbers; returns how many of them were in the set already."""
        number, end, known = first, first + count, 0
        while number < end:
            index, bit = divmod(number, self._BITS)
            here = min(end - number, self._BITS - bit)
            mask = ((1 << here) - 1) << bit
            chunk = self._chunks.get(index, 0)
            known += (chunk & mask).bit_count()
            self._chunks[index] = chunk | mask
            number += here
        self.count += count - known
        if count:
            self.end = max(self.end, end)
        return known


class _Check:
    """One pass over the tables of an image."""

    def __init__(self, storage: Storage, header: Header, repair: bool) -> None:
        self._storage = storage
        self._header = header
        self._repair = repair
        self._end = storage.size() // header.cluster_size * header.cluster_size
        self._used = _Clusters()
        self._report = Report(header.clusters, needs_check=bool(header.features & Feature.NEED_CHECK))

    def run(self) -> Report:
        header, report = self._header, self._report
        self._refer(header.l1_table_offset, header.table_size)
        self._check_l1()
        report.leaks = self._end // header.cluster_size - header.header_size - self._used.count
        if self._repair:
            self._storage.sync()
            if not report.corruptions:
                self._finish_repair()
        return report

    def _check_l1(self) -> None:
        header = self._header
        for first, place, entries in self._slices(header.l1_table_offset):
            bad = []
            for index, entry in enumerate(entries):
                if not entry:
                    continue
                if not header.is_cluster(entry, self._end, header.table_size):
                    bad.append(index)
                    what = (
                        f"entry {first + index} of the L1 table, {entry:#x}, is not the place of an L2 table"
                    )
                    self._note_bad_reference(what)
                elif twice := self._refer(entry, header.table_size):
                    self._note_double_references(twice, f"of the L2 table at {entry:#x}")
                else:
                    self._check_l2(entry, (first + index) * header.table_entries)
            self._clear(entries, bad, place)

    def _check_l2(self, table: int, first_cluster: int) -> None:
        size, report = self._header.cluster_size, self._report
        previous = 0
        for first, place, entries in self._slices(table):
            bad: list[int] = []
            for index, count, entry in _consecutive(entries, size):
                report.allocated_clusters += count
                report.fragmented_clusters += previous not in (0, entry - size)
                previous = entry + (count - 1) * size
                disk_offset = (first_cluster + first + index) * size
                good = self._usable(entry, count)
                if twice := self._refer(entry, good):
                    self._note_double_references(twice, f"of the data of disk offset {disk_offset} and on")
                for number in range(good, count):
                    bad.append(index + number)
                    where, value = disk_offset + number * size, entry + number * size
                    self._note_bad_reference(
                        f"the entry of disk offset {where}, {value:#x}, is not the place of a cluster"
                    )
            self._clear(entries, bad, place)

    def _slices(self, table: int) -> Iterator[tuple[int, int, array[int]]]:
        """(index of the first entry, its file offset, entries) for each part of a table that is not all 0."""
        for first in range(0, self._header.table_entries, SLICE_ENTRIES):
            count = min(SLICE_ENTRIES, self._header.table_entries - first)
            place = table + first * ENTRY_BYTES
            entries = read_entries(self._storage, place, count)
            if entries.tobytes() != _NO_ENTRIES[: count * ENTRY_BYTES]:
                yield first, place, entries

    def _usable(self, offset: int, count: int) -> int:
        """How many of these consecutive clusters the file has."""
        if not self._header.is_cluster(offset, self._end):
            return 0
        return min(count, (self._end - offset) // self._header.cluster_size)

    def _refer(self, offset: int, count: int) -> int:
        """Note references to clusters; returns how many of these were referenced before."""
        return self._used.add(offset // self._header.cluster_size, count)

    def _clear(self, entries: array[int], bad: list[int], place: int) -> None:
        """Repair part of a table by clearing wrong entries."""
        if bad and self._repair:
            for index in bad:
                entries[index] = 0
            self._storage.write(place, encode(entries))

    def _finish_repair(self) -> None:
        """With no corruption left: shorten the file to what is used and mark the image as clean, durably."""
        size, report = self._header.cluster_size, self._report
        report.leaks_fixed = self._end // size - self._used.end
        report.leaks -= report.leaks_fixed
        if report.leaks_fixed:
            self._storage.truncate(self._used.end * size)
        report.needs_check = False
        write_header(self._storage, self._header.without(Feature.NEED_CHECK))

    def _note_bad_reference(self, what: str) -> None:
        if self._repair:
            self._report.corruptions_fixed += 1
        else:
            self._report.corruptions += 1
        self._note(f"{what}: cleared" if self._repair else what)

    def _note_double_references(self, count: int, what: str) -> None:
        self._report.corruptions += count
        self._note(f"{count} clusters {what} are in use already, by another reference")

    def _note(self, problem: str) -> None:
        if len(self._report.problems) < PROBLEMS_SHOWN:
            self._report.problems.append(problem)


def _consecutive(entries: array[int], step: int) -> Iterator[tuple[int, int, int]]:
    """(index, count, first entry) of the data clusters that follow one another in the file."""
    index, length = 0, len(entries)
    while index < length:
        entry = entries[index]
        if entry <= ZERO:
            index += 1
            continue
        end, expected = index + 1, entry + step
        while end < length and entries[end] == expected:
            end, expected = end + 1, expected + step
        yield index, end - index, entry
        index = end
