"""An open flat image: data file, map and log together."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from threading import Lock
from uuid import UUID

from overlay.formats.flat import bits
from overlay.formats.flat.header import CHUNK_GRAINS, GRAIN, Flag, Header, trailer_at
from overlay.formats.flat.leftover import Leftover
from overlay.formats.flat.map import Map
from overlay.formats.image import Buffer, Image, Run, zero_runs
from overlay.formats.ranges import joined, runs_of
from overlay.formats.storage import Storage

_PIECE = 256
"""Runs that are looked up at once, under the lock."""
_CHUNKS_TOGETHER = 512
"""Whose bitmaps are changed at once, under the lock."""
_STEP = 1024 * CHUNK_GRAINS * GRAIN
"""Long ranges are changed in parts of at most 128 GiB."""


class FlatImage(Image):
    """A flat image that is not complete yet, or has become so while it was open.

    A write goes to the data file first, then into the notes for the log, then into the bitmaps in memory. The
    log is written before anything is acknowledged, so for many writes at once; the bitmaps reach the file
    after a sync of the data. Reads, and writes to what the guest has written already, take no lock.
    ``_flush_lock``, taken first where both are, lets one flush follow the other, so that one serves all who
    wait, and none returns while the one that covers it is under way.
    """

    cluster_size = GRAIN
    records_writer = True

    def __init__(
        self,
        data: Storage,
        file: Storage,
        header: Header,
        path: str,
        *,
        writable: bool,
        boot: UUID,
        remove_map: Callable[[], None],
        map_path: str = "",
    ) -> None:
        """Open what belongs together (see open.py); the image closes both storages in the end.

        ``boot`` is the current boot; ``remove_map`` lets the map's file disappear, durably; ``map_path`` is
        its path, for the trailer on a device, and for messages. Raises OSError, and ImageError if the map's
        directory is damaged.
        """
        self.size, self.backings = header.size, header.backings
        self._data, self._path = data, path
        self.map_path = map_path or f"{path}.map"
        self._step = min(_STEP, data.zero_step)
        self._writable = writable
        self.was_killed = not header.flags & Flag.CLEAN
        self.is_committed = bool(header.flags & Flag.COMMITTED)
        self.uuid = header.uuid
        self._leftover = Leftover(file, remove_map, self.map_path)
        self._map = Map(file, header, path, writable=writable, boot=boot)
        self.hides_writes = bool(self._map.header.flags & (Flag.UNCERTAIN | Flag.REOPENED))
        self._grains = self._map.grains
        self._lock = self._grains.lock
        self._flush_lock = Lock()
        self._asked = self._served = 0
        self._is_raw = self._closed = False

    @property
    def local_bytes(self) -> int:
        """Return the bytes of the grains that are present."""
        with self._lock:
            count = self._grains.present
            padding = -self.size % GRAIN
            last = self.size // GRAIN
            return count * GRAIN - (padding if padding and self._grains.has(last, last + 1) else 0)

    @property
    def written_bytes(self) -> int:
        """Return the bytes of the grains that the guest wrote; all, once it is not recorded any more."""
        with self._lock:
            written = self._grains.written * GRAIN
        return self.size if not self.backings or self._is_raw else min(written, self.size)

    @property
    def complete(self) -> bool:
        """Tell whether every grain is present."""
        return self._is_raw or self._grains.present == self._map.header.grains

    @property
    def raw_fd(self) -> int | None:
        """Return the data file, once it is the disk and nothing else."""
        return self._data.fileno() if self._is_raw else None

    @property
    def is_written_certain(self) -> bool:
        """Tell whether what is not told as written was copied; see Image."""
        return bool(self.backings) and not self._map.header.flags & Flag.UNCERTAIN

    @property
    def has_redo(self) -> bool:
        """Tell whether a redo log belongs to it, without which it is no disk; see formats/redo/."""
        return bool(self._map.header.flags & Flag.REDO)

    def mark_redo(self, *, has_redo: bool) -> None:
        """Say that from now on, or no longer, a redo log belongs to it, durably."""
        self._map.mark_redo(has_redo=has_redo)

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """Yield the runs that make up a range; see Image. Asks the file system where the holes are."""
        self._check_range(offset, length)
        for piece in joined(self._pieces(offset, offset + length)):
            yield from runs_of(self._data, piece, GRAIN, offset, offset + length, is_raw=self._is_raw)

    def absent(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield what of a range has to be fetched; see Image. The map alone says that.

        To look for holes in what is present would take the longer the more that is: tmpfs looks at each page.
        """
        self._check_range(offset, length)
        end = offset + length
        for first, last, present, _ in joined(self._pieces(offset, end)) if self.backings else ():
            if not present:
                begin, stop = max(offset, first * GRAIN), min(end, last * GRAIN)
                yield begin, stop - begin

    def is_local(self, offset: int, length: int) -> bool:
        """Tell whether no byte is absent; see Image."""
        self._check_range(offset, length)
        return self._grains.has(offset // GRAIN, -(-(offset + length) // GRAIN))

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer if the range is local; see Image."""
        end = offset + len(buffer)
        if offset < 0 or end > self.size:
            self._check_range(offset, len(buffer))
        if not self._grains.has(offset // GRAIN, (end + GRAIN - 1) // GRAIN):
            return False
        self._data.read_into(offset, buffer)
        return True

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Store data unless it covers an absent grain in part; see Image."""
        length = len(data)
        end = offset + length
        if offset < 0 or end > self.size or not self._writable or self._map.failed:
            self._check_change(offset, length)
        first, last = offset // GRAIN, (end + GRAIN - 1) // GRAIN
        if self._grains.has_written(first, last):
            self._data.write(offset, data)
            return True
        with self._lock:
            if self._map.is_full or ((offset | length) % GRAIN and self.needs_fetch(offset, length)):
                return False
            self._data.write(offset, data)
            if not self._is_raw:
                self._map.note(first, last)
        return True

    def write(self, offset: int, data: Buffer) -> bool:
        """Store it as write_now() does; make room in the log if that must be."""
        self._check_change(offset, len(data))
        while not self.write_now(offset, data):
            with self._lock:
                if self.needs_fetch(offset, len(data)):
                    return False
            self._make_room()
        return True

    def zero(self, offset: int, length: int) -> bool:
        """Make a range read as zeros; see Image."""
        self._check_change(offset, length)
        end = offset + length
        with self._lock:
            if self.needs_fetch(offset, length):
                return False
        while offset < end:
            stop = min(end, offset - offset % self._step + self._step)
            self._make_room()
            with self._lock:
                if self._map.is_full:
                    continue
                if self.needs_fetch(offset, stop - offset):
                    return False
                self._data.zero(offset, stop - offset)
                first, last = offset // GRAIN, -(-stop // GRAIN)
                if not self._grains.has_written(first, last):
                    self._map.note(first, last)
            offset = stop
        return True

    def fill(self, offset: int, data: Buffer, asked_at: int | None = None) -> int:
        """Store fetched data where it is absent; see Image."""
        view = memoryview(data)
        self._check_fill(offset, len(view))
        first, end = offset // GRAIN, -(-(offset + len(view)) // GRAIN)
        self._make_room()
        filled = 0
        with self._lock:
            if self._is_stale(asked_at):
                return 0
            for begin, stop in self._grains.absent(first, end):
                piece = view[begin * GRAIN - offset : stop * GRAIN - offset]
                for place, part, is_zero in zero_runs(piece, GRAIN):
                    # Under an absent grain there may be anything, even where nobody has written.
                    if is_zero:
                        self._data.zero(begin * GRAIN + place, len(part))
                    else:
                        self._data.write(begin * GRAIN + place, part)
                self._grains.set(begin, stop, written=False)
                filled += len(piece)
        return filled

    def fill_zero(self, offset: int, length: int, asked_at: int | None = None) -> int:
        """Absent grains become zeros; see Image."""
        self._check_fill(offset, length)
        filled, end = 0, offset + length
        while offset < end:
            stop = min(end, offset - offset % self._step + self._step)
            self._make_room()
            with self._lock:
                if self._is_stale(asked_at):
                    return filled
                for first, last in self._grains.absent(offset // GRAIN, -(-stop // GRAIN)):
                    begin, part = first * GRAIN, min(last * GRAIN, self.size) - first * GRAIN
                    self._data.zero(begin, part)
                    self._grains.set(first, last, written=False)
                    filled += part
            offset = stop
        return filled

    def log_writes(self) -> None:
        """Write the records of what was written into the log: those of many writes at once."""
        # Whoever finds nothing here knows that it is in the file: it is taken away only after that.
        if self._map.has_notes:
            with self._lock:
                self._map.write_notes()

    def commit(self) -> None:
        """Do the same as log_writes()."""
        self.log_writes()

    def flush(self) -> None:
        """Make the data durable, then the map that tells of it."""
        if not self._writable:
            return
        with self._lock:
            self._asked += 1
            ticket = self._asked
        with self._flush_lock:
            self._refuse_after_failed_sync()
            if ticket > self._served:
                self._flush()

    def invalidate(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Grains become absent again; see Image."""
        self._check_changes(ranges)
        with self._lock:
            # From now on nothing is stored that was asked for before.
            self.invalidations += 1
            is_log_empty = self._map.is_log_empty
        if not is_log_empty:
            self._empty_log()  # or it would make them present again
        try:
            self._map.forget(bits.masks(ranges, GRAIN, CHUNK_GRAINS, _CHUNKS_TOGETHER))
        except OSError:
            if self._map.failed:
                self._condemn()
            raise

    def finish(self) -> None:
        """Cut the trailer off and remove the map; see Image.

        The disk is finished also where the map cannot be removed yet: see :meth:`tidy`.
        """
        if self._is_raw:
            self.tidy()
            return
        self._check_change(0, 0)
        if not self.complete:
            raise OSError(errno.EBUSY, "part of the disk is still in the backing", self._path)
        self.flush()  # whoever finds no trailer must find a map that says that everything is present
        with self._flush_lock:
            if self._is_raw:
                return
            with self._lock:
                if not self.complete:
                    raise OSError(errno.EBUSY, "part of the disk has just been invalidated", self._path)
                self._grains.is_sealed = True
            try:
                self._data.truncate(self.size)
            finally:
                self._sync(self._data)  # that of a device syncs it, too: it is condemned where that failed
            with self._lock:
                self._is_raw, self.backings = True, ()
                self._map.drop_notes()
                # From now on no write looks any further.
                self._grains.set(0, self._map.header.grains, written=True)
                self._map.give_up()
        self.tidy()

    def tidy(self) -> None:
        """Remove the map, once it is needed no more."""
        if self._is_raw:
            self._leftover.remove()

    def share(self) -> None:
        """Give QEMU's image locks back."""
        self._data.share()
        if not self._is_raw:
            self._map.share()

    def close(self) -> None:
        """Flush, mark the map as clean, and give the files back."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._writable:
                self._empty_log()
            if self._writable and not self._is_raw:
                self._map.mark_clean()
        finally:
            if self._is_raw:
                self._leftover.close()
            else:
                self._map.close()
            self._data.close()

    def _flush(self) -> None:
        """Under the flush lock: what is in memory now becomes durable, the data first."""
        with self._lock:
            serving = self._asked
            changes = None if self._is_raw else self._map.take_changes()
        try:
            self._sync(self._data)
            if changes is not None:
                self._map.store(changes)
        except OSError:
            if changes is not None:
                self._map.put_back(changes)
            if self._map.failed:
                self._condemn()
            raise
        self._served = serving

    def _sync(self, storage: Storage) -> None:
        try:
            storage.sync()
        except OSError:
            self._condemn()
            raise

    def _condemn(self) -> None:
        """Let nobody who comes later believe the log: say so in whichever file still works."""
        self._map.mark_failed()
        if not self._is_raw:
            trailer = self._map.header.trailer(self.map_path)
            with suppress(OSError):
                failed = replace(trailer, flags=trailer.flags | Flag.FAILED)
                self._data.write(trailer_at(self.size), failed.pack())

    def _empty_log(self) -> None:
        """Flush until the log holds nothing but what was written meanwhile."""
        self.flush()
        self.flush()  # if a failure left both halves in use

    def _make_room(self) -> None:
        """Flush if the log or the memory for changes is full. Not under the lock."""
        if self._map.is_full:
            self.flush()

    def _pieces(self, offset: int, end: int) -> Iterator[tuple[int, int, bool, bool]]:
        """The grains' runs for a range, piece by piece."""
        first, last = offset // GRAIN, -(-end // GRAIN) if end > offset else 0
        while first < last:
            with self._lock:
                piece = list(islice(self._grains.runs(first, last), _PIECE))
            yield from piece
            first = piece[-1][1]

    def _check_change(self, offset: int, length: int) -> None:
        super()._check_change(offset, length)
        self._refuse_after_failed_sync()

    def _refuse_after_failed_sync(self) -> None:
        if self._map.failed:
            raise OSError(errno.EIO, "writing back to the disk has failed before", self._path)
