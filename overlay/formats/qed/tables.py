"""The two levels of tables that say where each cluster of a QED image is (QED spec, "Tables").

An entry of the L1 table is 0 or the file offset of an L2 table; one of an L2 table is 0 for absent, 1 for
zeros, or the file offset of a data cluster.

The L1 table is kept in memory as far as the disk's size needs it; of the L2 tables only slices are, the least
recently used going first. So what a header claims never decides how much memory is used.

Changes are made in memory. What :meth:`Tables.take_changes` gives out is written by :meth:`Tables.store`
after a sync: what an entry points to is durable before the entry. Of a new L2 table that may be the zeros of
the grown file, which mean absent, so the order among tables does not matter.

Not safe for several threads: the image puts its lock around every call.
"""

from __future__ import annotations

import errno
import sys
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nbdserve.common.errors import ImageError
from overlay.formats.qed.header import ENTRY_BYTES, Header
from overlay.formats.ranges import cut
from overlay.formats.storage import Storage

ABSENT, ZERO = 0, 1
"""Entries of an L2 table that are not offsets."""

SLICE_ENTRIES = 4096
"""Entries that are read, kept and dropped together: 32 KiB, which map 256 MiB at 64 KiB a cluster."""

CACHED_SLICES = 512
DIRTY_SLICES = 256
"""How many slices may wait for a commit before :attr:`Tables.is_full`."""


class _Slice:
    """A part of an L2 table: its entries and the range of them that the file does not have yet."""

    __slots__ = ("dirty_begin", "dirty_end", "entries", "file_offset")

    def __init__(self, file_offset: int, entries: array[int]) -> None:
        self.file_offset = file_offset
        self.entries = entries
        self.dirty_begin = self.dirty_end = 0

    def change(self, begin: int, values: array[int]) -> None:
        end = begin + len(values)
        self.entries[begin:end] = values
        self.touch(begin, end)

    def touch(self, begin: int, end: int) -> None:
        """Note that the file does not have these entries."""
        clean = self.dirty_begin == self.dirty_end
        self.dirty_begin = begin if clean else min(self.dirty_begin, begin)
        self.dirty_end = end if clean else max(self.dirty_end, end)


class Changes(NamedTuple):
    """Entries that the file does not have: L2 slices with what of them is to be written, and L1 indices."""

    parts: dict[int, tuple[_Slice, int, array[int]]]
    """By number: the slice, the index of the first of the entries, and these as they were."""
    l1_indices: set[int]


class Tables:
    """The tables of one open image, and where its file ends. Cluster numbers count the guest's disk."""

    def __init__(self, storage: Storage, header: Header, path: str) -> None:
        """Read the L1 table. Raises ImageError if an entry cannot be the place of a table, OSError."""
        self._storage = storage
        self._header = header
        self._path = path
        self.end = storage.size() // header.cluster_size * header.cluster_size
        """Where the next cluster is allocated, in bytes. What lies behind is no whole cluster: lost."""
        self._opened_end = self.end
        needed = -(-header.clusters // header.table_entries)
        self._l1 = read_entries(storage, header.l1_table_offset, needed)
        self._places = self._checked_places()
        self._new_l1: set[int] = set()
        """L1 entries that the file does not have yet."""
        self._slice_entries = min(SLICE_ENTRIES, header.table_entries)
        self._slices: OrderedDict[int, _Slice] = OrderedDict()
        self._dirty: dict[int, _Slice] = {}
        self._stored = Changes({}, set())
        """What is being brought to the file right now."""
        self._changed: set[int] = set()
        """Slices that may point behind the file's end as it was at first, because we made them."""

    def is_stored(self, cluster: int, count: int) -> bool:
        """Tell whether the file's tables tell of these clusters what ours do. All must be data in ours."""
        end = cluster + count
        while cluster < end:
            number, first = divmod(cluster, self._slice_entries)
            last = min(self._slice_entries, first + end - cluster)
            l1_index = self._l1_index(number)
            if l1_index in self._new_l1 or l1_index in self._stored.l1_indices:
                return False
            part = self._dirty.get(number)
            if part is not None and first < part.dirty_end and part.dirty_begin < last:
                return False
            stored = self._stored.parts.get(number)
            if stored is not None and first < stored[1] + len(stored[2]) and stored[1] < last:
                return False
            cluster += last - first
        return True

    @property
    def is_full(self) -> bool:
        """Tell whether so much waits for a commit that it should come before the next change."""
        return len(self._dirty) >= DIRTY_SLICES

    def runs(self, cluster: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield (cluster, count, entry) of what is alike, from ``cluster`` up to ``end``.

        The entry is ABSENT, ZERO, or the file offset of the first of ``count`` clusters that follow one
        another in the file. Neighbouring runs may be alike. Raises ImageError at a damaged table, OSError.
        """
        step = self._header.cluster_size
        while cluster < end:
            l1_index = cluster // self._header.table_entries
            if not self._l1[l1_index]:
                stop = min(end, (l1_index + 1) * self._header.table_entries)
                yield cluster, stop - cluster, ABSENT
                cluster = stop
                continue
            number, first = divmod(cluster, self._slice_entries)
            entries = self._slice(number).entries
            stop = min(len(entries), first + end - cluster)
            while first < stop:
                entry = expected = entries[first]
                last = first + 1
                if entry > ZERO:
                    while last < stop and entries[last] == (expected := expected + step):
                        last += 1
                    self._check_data(entry, last - first, cluster, self._end_for(number))
                else:
                    while last < stop and entries[last] == entry:
                        last += 1
                yield cluster, last - first, entry
                cluster, first = cluster + last - first, last

    def set(self, cluster: int, count: int, entry: int) -> None:
        """Map clusters to ABSENT, to ZERO or to consecutive places from a file offset; allocate L2 tables.

        Raises OSError if a table cannot be had; what was mapped by then stays.
        """
        step = self._header.cluster_size if entry > ZERO else 0
        while count:
            l1_index = cluster // self._header.table_entries
            if not self._l1[l1_index]:
                self._add_table(l1_index)
            number, first = divmod(cluster, self._slice_entries)
            part = self._slice(number)
            self._check_before_change(number, part)
            here = min(count, len(part.entries) - first)
            values = array("Q", range(entry, entry + here * step, step) if step else [entry] * here)
            part.change(first, values)
            self._dirty[number] = part
            cluster, count, entry = cluster + here, count - here, entry + here * step

    def clear(self, number: int, parts: list[slice]) -> int:
        """Map parts of a slice, in order, to ABSENT; returns how many clusters were not before."""
        if not self._l1[self._l1_index(number)]:
            return 0
        part = self._slice(number)
        before = part.entries.count(ABSENT)
        zeros = array("Q", bytes(ENTRY_BYTES * len(part.entries)))
        for each in parts:
            part.entries[each] = zeros[each]
        part.touch(parts[0].start, parts[-1].stop)
        self._dirty[number] = part
        return part.entries.count(ABSENT) - before

    def slices(self, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, list[slice]]]:
        """Cut ranges (offset, length) up at the slices: number of each, once, and parts of its entries."""
        current = -1
        parts: list[slice] = []
        for number, first, last in cut(ranges, self._header.cluster_size, self._slice_entries):
            if number != current:
                if parts:
                    yield current, parts
                current, parts = number, []
            parts.append(slice(first, last))
        if parts:
            yield current, parts

    def allocate(self, count: int) -> int:
        """Let the file grow by ``count`` clusters of zeros; the offset of the first. Raises OSError."""
        offset = self.end
        if offset == self._opened_end:
            self._storage.truncate(offset)  # what is no whole cluster would not be zeros
        self._storage.truncate(offset + count * self._header.cluster_size)
        self.end = offset + count * self._header.cluster_size
        return offset

    def give_back(self, offset: int) -> None:
        """Undo an allocation, the last one made, that came to no use."""
        self.end = offset
        self._storage.truncate(offset)

    def take_changes(self) -> Changes:
        """Return what the file's tables lack. A sync, and :meth:`store`, must follow before the next call."""
        parts = {
            number: (part, part.dirty_begin, part.entries[part.dirty_begin : part.dirty_end])
            for number, part in self._dirty.items()
        }
        for part in self._dirty.values():
            part.dirty_begin = part.dirty_end = 0
        self._stored = Changes(parts, self._new_l1)
        self._dirty, self._new_l1 = {}, set()
        return self._stored

    def store(self, changes: Changes) -> None:
        """Bring changes to the file after the sync. OSError: they are still to be taken and stored."""
        try:
            for part, begin, values in changes.parts.values():
                self._storage.write(part.file_offset + begin * ENTRY_BYTES, encode(values))
            for l1_index in sorted(changes.l1_indices):
                offset = self._header.l1_table_offset + l1_index * ENTRY_BYTES
                self._storage.write(offset, encode(self._l1[l1_index : l1_index + 1]))
        except OSError:
            self.put_back(changes)
            raise
        self._stored = Changes({}, set())

    def put_back(self, changes: Changes) -> None:
        """Undo :meth:`take_changes`: the file does not have these yet."""
        for number, (part, begin, values) in changes.parts.items():
            part.touch(begin, begin + len(values))
            self._dirty[number] = part
        self._new_l1 |= changes.l1_indices
        self._stored = Changes({}, set())

    def count_absent(self) -> int:
        """Tell how many clusters of the disk are absent. Reads all L2 tables, raises ImageError, OSError."""
        absent = 0
        for l1_index, place in enumerate(self._l1):
            first = l1_index * self._header.table_entries
            count = min(self._header.table_entries, self._header.clusters - first)
            if not place:
                absent += count
                continue
            for start in range(first, first + count, self._slice_entries):
                part = self._slice(start // self._slice_entries)
                absent += part.entries.count(ABSENT)
        return absent

    def _add_table(self, l1_index: int) -> None:
        offset = self.allocate(self._header.table_size)
        self._l1[l1_index] = offset
        self._places.append(offset)
        self._new_l1.add(l1_index)

    def _l1_index(self, number: int) -> int:
        """Which L2 table a slice belongs to."""
        return number * self._slice_entries // self._header.table_entries

    def _slice(self, number: int) -> _Slice:
        """A slice of an allocated L2 table, from the cache or the file."""
        part = self._slices.get(number)
        if part is not None:
            self._slices.move_to_end(number)
            return part
        part = self._dirty.get(number)
        if part is None:
            stored = self._stored.parts.get(number)
            part = stored[0] if stored is not None else self._load_slice(number)
        self._slices[number] = part
        if len(self._slices) > CACHED_SLICES:
            self._slices.popitem(last=False)
        return part

    def _load_slice(self, number: int) -> _Slice:
        first = number * self._slice_entries
        place = self._l1[self._l1_index(number)] + first % self._header.table_entries * ENTRY_BYTES
        count = min(self._slice_entries, self._header.clusters - first)
        return _Slice(place, read_entries(self._storage, place, count))

    def _checked_places(self) -> array[int]:
        """The places of all L2 tables in the file, sorted; they and the L1 table must not overlap."""
        header = self._header
        for index, offset in enumerate(self._l1):
            if offset and not header.is_cluster(offset, self.end, header.table_size):
                raise self._damaged(
                    f"entry {index} of the L1 table, {offset:#x}, is not the place of an L2 table"
                )
        places = array("Q", sorted([header.l1_table_offset, *filter(None, self._l1)]))
        for i in range(1, len(places)):
            if places[i] < places[i - 1] + header.table_bytes:
                raise self._damaged(
                    f"two tables overlap in the file, at {places[i - 1]:#x} and {places[i]:#x}"
                )
        return places

    def _end_for(self, number: int) -> int:
        """Where the clusters end to which a slice can point."""
        return self.end if number in self._changed else self._opened_end

    def _check_before_change(self, number: int, part: _Slice) -> None:
        """Before a slice first points behind the end that the file had: it must not have done so already."""
        if number in self._changed:
            return
        for index, entry in enumerate(part.entries):
            if entry > ZERO and not self._header.is_cluster(entry, self._opened_end):
                raise self._damaged_entry(number * self._slice_entries + index, entry)
        self._changed.add(number)

    def _check_data(self, offset: int, count: int, cluster: int, end: int) -> None:
        """Refuse places that are no clusters, or where a table lies, which the guest would overwrite."""
        if not self._header.is_cluster(offset, end, count):
            raise self._damaged_entry(cluster, offset)
        index = bisect_left(self._places, offset + count * self._header.cluster_size)
        if index and self._places[index - 1] + self._header.table_bytes > offset:
            disk_offset = cluster * self._header.cluster_size
            raise self._damaged(
                f"the data of disk offset {disk_offset} lies on the table at {self._places[index - 1]:#x}"
            )

    def _damaged_entry(self, cluster: int, entry: int) -> ImageError:
        disk_offset = cluster * self._header.cluster_size
        return self._damaged(
            f"the entry of disk offset {disk_offset}, {entry:#x}, is not the place of a cluster"
        )

    def _damaged(self, what: str) -> ImageError:
        return ImageError(f"{self._path}: damaged QED tables: {what}; see nbd-overlay check {self._path}")


def read_entries(storage: Storage, offset: int, count: int) -> array[int]:
    """Read ``count`` table entries at a byte offset of the file; OSError if they are not all there."""
    data = storage.read(offset, count * ENTRY_BYTES)
    if len(data) != count * ENTRY_BYTES:
        raise OSError(errno.EIO, f"the image's file ends within a table, at {offset + len(data)}")
    entries = array("Q", data)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def encode(entries: array[int]) -> bytes:
    """Return table entries as they lie in the file."""
    if sys.byteorder == "big":
        entries = array("Q", entries)
        entries.byteswap()
    return entries.tobytes()
