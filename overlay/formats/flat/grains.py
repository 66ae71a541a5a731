"""Which grains of the disk are present, and which of them the guest wrote: directory and bitmaps of a map.

For each chunk of 32768 grains (128 MiB) the directory has two numbers of 2 bytes: how many grains are present
and how many were written. 0 and all mean what they say, and the bitmap is not looked at, whatever is in it.
In between the bitmap decides, and the number may be wrong after a power cut; it is corrected when the
bitmap is read. So a disk of which nothing, or everything, is present needs no bitmaps at all.

A chunk's pair of bitmaps, 4 KiB each, first present, then written, is read when it is needed, and the oldest
that the file has too are dropped. Changes are made in memory. :meth:`Grains.take_changes` gives out what the
file lacks, to be stored once the data that the bits tell of is durable.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections.abc import Iterator
from itertools import pairwise
from threading import RLock

from nbdserve.common.errors import ImageError
from overlay.formats.flat import bits
from overlay.formats.flat.changes import Changes, Pair
from overlay.formats.flat.header import CHUNK_GRAINS, DIRECTORY_AT, ENTRY_BYTES, PAIR_BYTES, Header
from overlay.formats.storage import Storage

CACHED_PAIRS = 2048
DIRTY_PAIRS = 1024
"""How many chunks may wait for a flush before :attr:`Grains.is_full`."""


class Grains:
    """The map's content. Whoever calls holds :attr:`lock`, but for ``has`` and ``has_written``."""

    def __init__(self, file: Storage, header: Header, path: str) -> None:
        """Read the directory. Raises ImageError if it is damaged, OSError."""
        self.lock = RLock()
        self._file = file
        self._header = header
        self._path = path
        self._chunks = header.chunks
        self._last_grains = header.grains - (self._chunks - 1) * CHUNK_GRAINS
        self._directory = self._read_directory()
        """Two numbers for each chunk: present, written."""
        self._stored = self._directory[:]
        """The same as in the file."""
        self.present = sum(self._directory[0::2])
        """How many grains are present."""
        self._pairs: dict[int, Pair] = {}
        self._changed: set[int] = set()
        self._storing: list[Changes] = []
        """What is on its way to the file: one flush's, and what is being forgotten."""
        self.is_sealed = False
        """Everything is present, and nothing may be forgotten any more."""

    @property
    def is_full(self) -> bool:
        """Tell whether so much waits for a flush that it should come before the next change."""
        return len(self._changed) >= DIRTY_PAIRS

    @property
    def written(self) -> int:
        """Tell how many grains the guest wrote."""
        return sum(self._directory[1::2])

    def has(self, first: int, end: int) -> bool:
        """Tell whether all grains of a range are present. Needs no lock."""
        if end - first == 1:  # the most frequent case
            chunk, begin = divmod(first, CHUNK_GRAINS)
            present = self._directory[2 * chunk]
            if present == CHUNK_GRAINS or not present:
                return present != 0
            pair = self._pairs.get(chunk) or self._load(chunk)
            return bool(pair.present[begin >> 3] >> (begin & 7) & 1)
        for chunk, begin, stop in _parts(first, end):
            present = self._directory[2 * chunk]
            if present == CHUNK_GRAINS:
                continue
            if not present:
                return False
            pair = self._pairs.get(chunk) or self._load(chunk)
            if bits.get(pair.present, begin, stop).bit_count() != stop - begin:
                return False
        return True

    def has_written(self, first: int, end: int) -> bool:
        """Tell whether all grains of a range are present and were written by the guest. Needs no lock."""
        if end - first == 1:
            chunk, begin = divmod(first, CHUNK_GRAINS)
            written = self._directory[2 * chunk + 1]
            if written == CHUNK_GRAINS or not written:
                return written != 0
            pair = self._pairs.get(chunk) or self._load(chunk)
            return bool(pair.written[begin >> 3] >> (begin & 7) & 1)
        for chunk, begin, stop in _parts(first, end):
            written = self._directory[2 * chunk + 1]
            if written == CHUNK_GRAINS:
                continue
            if not written:
                return False
            pair = self._pairs.get(chunk) or self._load(chunk)
            if bits.get(pair.written, begin, stop).bit_count() != stop - begin:
                return False
        return True

    def runs(self, first: int, end: int) -> Iterator[tuple[int, int, bool, bool]]:
        """Yield (first grain, end, present, written) of what is alike, in order; neighbours may be alike."""
        for chunk, begin, stop in _parts(first, end):
            base = chunk * CHUNK_GRAINS
            present, written = self._directory[2 * chunk : 2 * chunk + 2]
            full = self._grains_of(chunk)
            if present in (0, full) and written in (0, full):
                yield base + begin, base + stop, present == full, written == full
                continue
            pair = self._pair(chunk)
            edges = {stop}
            for bitmap in (pair.present, pair.written):
                value = bits.get(bitmap, begin, stop)
                edges.update(begin + part for part, _, _ in bits.runs(value, stop - begin))
            for left, right in pairwise(sorted(edges)):
                is_present, is_written = (
                    bool(bitmap[left >> 3] >> (left & 7) & 1) for bitmap in (pair.present, pair.written)
                )
                yield base + left, base + right, is_present, is_written

    def absent(self, first: int, end: int) -> list[tuple[int, int]]:
        """Return the longest runs of absent grains in a range, as (first, end)."""
        found: list[tuple[int, int]] = []
        for begin, stop, present, _ in self.runs(first, end):
            if present:
                continue
            if found and found[-1][1] == begin:
                found[-1] = (found[-1][0], stop)
            else:
                found.append((begin, stop))
        return found

    def set(self, first: int, end: int, *, written: bool) -> None:
        """Grains are present, and perhaps written by the guest."""
        if end - first == 1:  # the most frequent case
            self._set_one(first, written)
            return
        for chunk, begin, stop in _parts(first, end):
            index, full = 2 * chunk, self._grains_of(chunk)
            before = self._directory[index]
            if stop - begin == full and (written or not self._directory[index + 1]):
                self._directory[index] = full
                if written:
                    self._directory[index + 1] = full
                self._pairs.pop(chunk, None)
            else:
                pair = self._pair(chunk)  # which may correct the counts
                before = self._directory[index]
                self._directory[index] += bits.set_all(pair.present, begin, stop)
                if written:
                    self._directory[index + 1] += bits.set_all(pair.written, begin, stop)
            self.present += self._directory[index] - before
            self._changed.add(chunk)

    def _set_one(self, grain: int, written: bool) -> None:
        chunk, number = divmod(grain, CHUNK_GRAINS)
        pair = self._pairs.get(chunk) or self._load(chunk)
        byte, bit = number >> 3, 1 << (number & 7)
        if not pair.present[byte] & bit:
            pair.present[byte] |= bit
            self._directory[2 * chunk] += 1
            self.present += 1
        if written and not pair.written[byte] & bit:
            pair.written[byte] |= bit
            self._directory[2 * chunk + 1] += 1
        self._changed.add(chunk)

    def forget(self, masks: dict[int, bytearray | None]) -> Changes:
        """Let grains be absent: for each chunk those whose bit its mask lacks; None: all of the chunk's.

        Returns what the file must be told now, whatever else it lacks; :meth:`stored` or :meth:`put_back`
        must follow. Nothing that is on its way to the file brings them back. Raises OSError: EBUSY once the
        map is sealed.
        """
        if self.is_sealed:
            raise OSError(errno.EBUSY, "the image is complete and has no map any more", self._path)
        lacking = {chunk for chunk in masks if chunk in self._changed or self._is_on_its_way(chunk)}
        self._changed |= masks.keys()  # so that none of their bitmaps is dropped meanwhile
        entries: dict[int, tuple[int, int]] = {}
        pairs: dict[int, Pair] = {}
        for chunk, given in masks.items():
            mask, full = int.from_bytes(given or b"", "little"), self._grains_of(chunk)
            for changes in self._storing:
                if chunk in changes.chunks:
                    changes.keep(chunk, mask, full)
            pair = self._keep(chunk, mask)
            stored = self._stored[2 * chunk : 2 * chunk + 2]
            if not stored[0]:
                continue
            if not mask or pair is None:
                entries[chunk] = (0, 0)
                continue
            if chunk in lacking:
                # Nothing else that the file lacks may get there with it.
                pair = Pair.read(stored, self._bitmaps(self._stored, chunk), full)
                pair.keep(mask)
            pairs[chunk], entries[chunk] = pair.copy(), pair.counts
        self._changed -= masks.keys() - lacking
        changes = Changes(entries, pairs)
        self._storing.append(changes)
        return changes

    def _keep(self, chunk: int, mask: int) -> Pair | None:
        """Clear bits in memory; returns the chunk's bitmaps if some are left."""
        index = 2 * chunk
        before = self._directory[index]
        if not before:
            return None
        if mask:
            pair = self._pair(chunk)
            before = self._directory[index]  # which that may have corrected
            pair.keep(mask)
            self._directory[index : index + 2] = array("H", pair.counts)
            self.present += self._directory[index] - before
            return pair
        self._directory[index : index + 2] = array("H", (0, 0))
        self._pairs.pop(chunk, None)
        self.present -= before
        return None

    def take_changes(self) -> Changes:
        """Return what the file lacks. :meth:`stored` or :meth:`put_back` must follow before the next call."""
        chunks = sorted(self._changed)
        needed = [chunk for chunk in chunks if any(self._needs_pair(self._directory, chunk))]
        pairs = {chunk: self._pair(chunk).copy() for chunk in needed}  # which may correct the counts
        entries = {chunk: (self._directory[2 * chunk], self._directory[2 * chunk + 1]) for chunk in chunks}
        changes = Changes(entries, pairs)
        self._storing.append(changes)
        self._changed = set()
        return changes

    def put_back(self, changes: Changes) -> None:
        """The file still lacks these."""
        self._changed |= changes.chunks
        self._storing.remove(changes)

    def has_order(self, changes: Changes) -> bool:
        """Tell whether the directory must not say "look at the bitmap" before a sync of the bitmaps."""
        for chunk in changes.pairs:
            now, then = changes.entry(chunk), self._stored[2 * chunk : 2 * chunk + 2]
            full = self._grains_of(chunk)
            if any(new not in (0, full) and old in (0, full) for new, old in zip(now, then, strict=True)):
                return True
        return False

    def store_pairs(self, changes: Changes) -> None:
        """Write bitmaps to the file. Raises OSError. Needs no lock."""
        for chunk, pair in changes.pairs.items():
            self._file.write(self._header.bitmaps_at + chunk * PAIR_BYTES, pair.pack())
        changes.has_stored_pairs = True

    def store_directory(self, changes: Changes) -> None:
        """Then write the directory, and sync. Raises OSError. Needs no lock."""
        for chunk, entries in changes.runs:
            self._file.write(DIRECTORY_AT + chunk * ENTRY_BYTES, _little_endian(entries).tobytes())

    def stored(self, changes: Changes) -> None:
        """They are durable in the file now."""
        for chunk, entries in changes.runs:
            self._stored[2 * chunk : 2 * chunk + len(entries)] = entries
        self._storing.remove(changes)

    def recount(self) -> int:
        """Read all bitmaps that matter and correct the directory; returns how many entries were wrong."""
        wrong = 0
        for chunk in range(self._chunks):
            before = self._directory[2 * chunk : 2 * chunk + 2]
            if any(self._needs_pair(self._directory, chunk)):
                self._load(chunk)
                wrong += self._directory[2 * chunk : 2 * chunk + 2] != before
        return wrong

    def _is_on_its_way(self, chunk: int) -> bool:
        """Whether the file may lack bitmaps of a chunk that somebody is storing."""
        return any(chunk in each.chunks and not each.has_stored_pairs for each in self._storing)

    def _grains_of(self, chunk: int) -> int:
        return CHUNK_GRAINS if chunk + 1 < self._chunks else self._last_grains

    def _needs_pair(self, directory: array[int], chunk: int) -> tuple[bool, bool]:
        """Whether a directory's entry says "look at the bitmap": present, written."""
        full = self._grains_of(chunk)
        return directory[2 * chunk] not in (0, full), directory[2 * chunk + 1] not in (0, full)

    def _pair(self, chunk: int) -> Pair:
        return self._pairs.get(chunk) or self._load(chunk)

    def _load(self, chunk: int) -> Pair:
        """A chunk's bitmaps from the file, or from what the directory knows of them."""
        with self.lock:
            pair = self._pairs.get(chunk)
            if pair is not None:
                return pair
            index = 2 * chunk
            raw = self._bitmaps(self._directory, chunk)
            pair = Pair.read(self._directory[index : index + 2], raw, self._grains_of(chunk))
            counts = array("H", pair.counts)
            if counts != self._directory[index : index + 2]:
                self.present += counts[0] - self._directory[index]
                self._directory[index : index + 2] = counts
                self._changed.add(chunk)
            self._drop_oldest()
            self._pairs[chunk] = pair
            return pair

    def _bitmaps(self, directory: array[int], chunk: int) -> bytes:
        """A chunk's bitmaps as they are in the file, if an entry of a directory needs them."""
        if not any(self._needs_pair(directory, chunk)):
            return bytes(PAIR_BYTES)
        raw = self._file.read(self._header.bitmaps_at + chunk * PAIR_BYTES, PAIR_BYTES)
        if len(raw) != PAIR_BYTES:
            raise OSError(errno.EIO, "the map's file ends within its bitmaps", self._path)
        return raw

    def _drop_oldest(self) -> None:
        """Make room among the pairs, but keep what the file lacks."""
        if len(self._pairs) < CACHED_PAIRS:
            return
        for chunk in list(self._pairs):
            if chunk not in self._changed and not self._is_on_its_way(chunk):
                del self._pairs[chunk]
                if len(self._pairs) < CACHED_PAIRS * 7 // 8:
                    return

    def _read_directory(self) -> array[int]:
        raw = self._file.read(DIRECTORY_AT, self._chunks * ENTRY_BYTES)
        directory = array("H", raw)
        if len(directory) != 2 * self._chunks:
            raise OSError(errno.EIO, "the map's file ends within its directory", self._path)
        directory = _little_endian(directory)
        present, written = directory[0::2], directory[1::2]
        too_many = max(present) > CHUNK_GRAINS or present[-1] > self._last_grains
        if too_many or (
            any(written) and any(more > all_ for more, all_ in zip(written, present, strict=True))
        ):
            raise ImageError(
                f"{self._path}: damaged map: the directory has impossible counts; make a new overlay"
            )
        return directory


def _parts(first: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(chunk, first grain in it, end in it) for a range of grains."""
    while first < end:
        chunk, begin = divmod(first, CHUNK_GRAINS)
        stop = min(CHUNK_GRAINS, begin + end - first)
        yield chunk, begin, stop
        first += stop - begin


def _little_endian(numbers: array[int]) -> array[int]:
    """The numbers as they lie in the file, or the other way round."""
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers
