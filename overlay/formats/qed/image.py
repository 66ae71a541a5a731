"""An open QED image: the guest's disk on top of header and tables (QED spec, "Tables")."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Self

from nbdserve.common.errors import ImageError
from overlay.formats.image import Buffer, Image, Run, State, zero_runs
from overlay.formats.qed.check import check
from overlay.formats.qed.header import Feature, read_header, write_header
from overlay.formats.qed.tables import ABSENT, SLICE_ENTRIES, ZERO, Tables
from overlay.formats.storage import Storage, open_file

_PIECE = 256
"""Runs that are looked up at once, under the lock."""


class QedImage(Image):
    """A QED image. Clusters are allocated at the end of its file and never move.

    The feature NEED_CHECK, which QEMU sets when it does not order its writes, is never set here: data is
    durable before a table points to it, so that whatever interrupts us leaks clusters at worst.

    ``_lock`` guards the tables; ``_commit_lock``, taken first where both are, lets one thread after the other
    bring them to the file, so that one sync serves all who wait for it.
    """

    def __init__(self, storage: Storage, path: str, *, writable: bool) -> None:
        """Open the image in a storage, which it closes in the end; ``path`` is for messages.

        A writable image that was not closed cleanly is checked first. Raises ImageError, OSError.
        """
        self._storage = storage
        self._path = path
        self._writable = writable
        self._closed = False
        self._is_finished = False
        """Whether nothing is absent, and may never be again."""
        self.header, backing = read_header(storage, path)
        self.backings = () if backing is None else (backing,)
        if writable:
            self._take_over()
        self.size = self.header.image_size
        self.cluster_size = self.header.cluster_size
        self._tables = Tables(storage, self.header, path)
        self._absent: int | None = None
        """Bytes that are absent, once they have been counted."""
        self._lock = Lock()
        self._commit_lock = Lock()
        self._changes = self._committed = 0
        self._durable = -1  # what a killed process left behind may not be
        """Numbers of the last change, of the last that the tables in the file tell of, and so on."""

    @classmethod
    def open(cls, path: Path, *, writable: bool = False, force_share: bool = False) -> Self:
        """Open an image file under QEMU's image locks. Raises ImageError, OSError."""
        storage = open_file(path, writable=writable, force_share=force_share)
        try:
            return cls(storage, str(path), writable=writable)
        except BaseException:
            storage.close()
            raise

    @property
    def local_bytes(self) -> int:
        """Return the bytes that are not absent. The first time this reads all tables."""
        if not self.backings:
            return self.size
        with self._lock:
            if self._absent is None:
                self._absent = self._count_absent()
            return self.size - self._absent

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """Yield the runs that make up a range; see Image."""
        self._check_range(offset, length)
        pending: Run | None = None
        for cluster, count, entry in self._clusters(offset, length):
            run = self._clipped(cluster, count, entry, offset, length)
            if pending is None:
                pending = run
            elif run.state is pending.state and (
                run.file_offset is None
                or pending.file_offset is None
                or run.file_offset == pending.file_offset + pending.length
            ):
                pending = pending._replace(length=pending.length + run.length)
            else:
                yield pending
                pending = run
        if pending is not None:
            yield pending

    def is_local(self, offset: int, length: int) -> bool:
        """Tell whether no byte is absent; see Image."""
        self._check_range(offset, length)
        return not self.backings or all(entry != ABSENT for _, _, entry in self._clusters(offset, length))

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer if the range is local; see Image."""
        length = len(buffer)
        self._check_range(offset, length)
        with self._lock:
            entries = self._entries(offset, length)
        if self.backings and any(entry == ABSENT for _, _, entry in entries):
            return False
        # Clusters do not move, nor does another take their place: what lies there needs no lock.
        for entry in entries:
            run = self._clipped(*entry, offset, length)
            piece = buffer[run.offset - offset :][: run.length]
            if run.file_offset is not None:
                self._storage.read_into(run.file_offset, piece)
            else:
                piece[:] = bytes(run.length)
        return True

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Store data in clusters that the tables in the file know already; see Image."""
        view = memoryview(data).cast("B")
        self._check_change(offset, len(view))
        with self._lock:
            entries = self._entries(offset, len(view))
            for cluster, count, entry in entries:
                if entry <= ZERO or not self._tables.is_stored(cluster, count):
                    return False
            self._store(entries, offset, view)
        return True

    def write(self, offset: int, data: Buffer) -> bool:
        """Store data; see Image."""
        view = memoryview(data).cast("B")
        self._check_change(offset, len(view))
        self._make_room()
        with self._lock:
            if self._needs_fetch(offset, len(view)):
                return False
            self._store(self._entries(offset, len(view)), offset, view)
        return True

    def zero(self, offset: int, length: int) -> bool:
        """Make a range read as zeros; see Image. Data clusters keep their place, with a hole in it."""
        self._check_change(offset, length)
        with self._lock:
            if self._needs_fetch(offset, length):
                return False
        for begin, part in self._parts(offset, length):
            with self._lock:
                if self._needs_fetch(begin, part):
                    return False
                self._changes += 1
                for cluster, count, entry in self._entries(begin, part):
                    run = self._clipped(cluster, count, entry, begin, part)
                    if run.file_offset is not None:
                        self._storage.zero(run.file_offset, run.length)
                    elif entry == ABSENT and self.backings:
                        self._set(cluster, count, ZERO, was=ABSENT)
        return True

    def fill(self, offset: int, data: Buffer, asked_at: int | None = None) -> int:
        """Store fetched data where it is absent; see Image."""
        view = memoryview(data).cast("B")
        self._check_fill(offset, len(view))
        if not self.backings:
            return 0
        self._make_room()
        filled = 0
        with self._lock:
            if self._is_stale(asked_at):
                return 0
            for cluster, count, entry in self._entries(offset, len(view)):
                if entry != ABSENT:
                    continue
                run = self._clipped(cluster, count, entry, offset, len(view))
                filled += run.length
                for begin, part, is_zero in zero_runs(
                    view[run.offset - offset :][: run.length], self.cluster_size
                ):
                    first, number = cluster + begin // self.cluster_size, -(-len(part) // self.cluster_size)
                    if is_zero:
                        self._set(first, number, ZERO, was=ABSENT)
                    else:
                        self._write_new(first, number, run.offset + begin, part, was=ABSENT)
            self._changes += 1
        return filled

    def fill_zero(self, offset: int, length: int, asked_at: int | None = None) -> int:
        """Absent clusters become zeros; see Image."""
        self._check_fill(offset, length)
        filled = 0
        for begin, part in self._parts(offset, length if self.backings else 0):
            with self._lock:
                if self._is_stale(asked_at):
                    return filled
                self._changes += 1
                for cluster, count, entry in self._entries(begin, part):
                    if entry == ABSENT:
                        self._set(cluster, count, ZERO, was=ABSENT)
                        filled += self._bytes(cluster, count)
        return filled

    def invalidate(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Make clusters absent again; see Image. The space they had in the file is leaked."""
        self._check_changes(ranges)
        with self._lock:
            # From now on nothing is stored that was asked for before.
            self.invalidations += 1
        for number, parts in self._tables.slices(ranges):
            self._make_room()
            with self._lock:
                if self._is_finished or not self.backings:
                    raise OSError(errno.EBUSY, "the image is complete and has no backing", self._path)
                absent, self._absent = self._absent, None  # if it fails half-way they are counted again
                self._changes += 1
                padding = self._padding()
                cleared = self._tables.clear(number, parts) * self.cluster_size
                if absent is not None:
                    self._absent = absent + cleared + padding - self._padding()
        self.flush()

    def log_writes(self) -> None:
        """Do nothing: only writes in place are taken at once."""

    def commit(self) -> None:
        """Let the tables in the file tell of every change so far; see Image."""
        self._bring_to_file(durable=False)

    def flush(self) -> None:
        """Commit, and return when everything is durable."""
        self._bring_to_file(durable=True)

    def finish(self) -> None:
        """Drop the backing from the header; see Image."""
        if not self.backings:
            return
        self._check_change(0, 0)
        if not self.complete:
            raise OSError(errno.EBUSY, "part of the disk is still in the backing", self._path)
        self.flush()
        with self._commit_lock:
            header = self.header.without_backing()
            with self._lock:
                if self._absent != 0:
                    raise OSError(errno.EBUSY, "part of the disk has just been invalidated", self._path)
                self._is_finished = True
            write_header(self._storage, header)
            self.header, self.backings = header, ()

    def tidy(self) -> None:
        """Nothing is left over."""

    def share(self) -> None:
        """Give QEMU's image locks back."""
        self._storage.share()

    def close(self) -> None:
        """Flush what was written and give the file back. OSError if that fails; closed it is in any case."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._writable:
                self.flush()
        finally:
            self._storage.close()

    def _take_over(self) -> None:
        """What a program does that is going to write (QED spec, "Header", "Consistency checking")."""
        header = replace(self.header, autoclear_features=0)
        if header.features & Feature.NEED_CHECK:
            errors = check(self._storage, header).corruptions
            if errors:
                raise ImageError(
                    f"{self._path}: the image was not closed cleanly and has {errors} errors; "
                    f"see nbd-overlay check {self._path}, and its --repair"
                )
            header = header.without(Feature.NEED_CHECK)
        if header != self.header:
            write_header(self._storage, header)
            self.header = header

    def _bring_to_file(self, *, durable: bool) -> None:
        """Sync the data, write the tables that tell of it; one thread does it for all that wait here."""
        with self._lock:
            wanted = self._changes
        with self._commit_lock:
            if wanted <= (self._durable if durable else self._committed):
                return
            with self._lock:
                number = self._changes
                changes = self._tables.take_changes()
            if changes.parts or changes.l1_indices:
                try:
                    self._storage.sync()
                except OSError:
                    with self._lock:
                        self._tables.put_back(changes)
                    raise
                with self._lock:
                    self._tables.store(changes)
            self._committed = number
            if durable:
                self._storage.sync()
                self._durable = number

    def _make_room(self) -> None:
        """Commit if too much waits for it. Not under the lock."""
        if self._tables.is_full:
            self.commit()

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """A long range in parts whose table entries fit into memory, with room made for the changes."""
        step = SLICE_ENTRIES * self.cluster_size
        end = offset + length
        while offset < end:
            self._make_room()
            part = min(end - offset, step - offset % step)
            yield offset, part
            offset += part

    def _clusters(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The tables' runs for a range, piece by piece; for who does not hold the lock."""
        cluster, end = self._span(offset, length)
        while cluster < end:
            with self._lock:
                piece = list(islice(self._tables.runs(cluster, end), _PIECE))
            yield from piece
            cluster = piece[-1][0] + piece[-1][1]

    def _entries(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """The tables' runs for a range; for who holds the lock."""
        return list(self._tables.runs(*self._span(offset, length)))

    def _span(self, offset: int, length: int) -> tuple[int, int]:
        end = -(-(offset + length) // self.cluster_size) if length else 0
        return offset // self.cluster_size, end

    def _bytes(self, cluster: int, count: int) -> int:
        """How many bytes of the disk clusters have."""
        return min((cluster + count) * self.cluster_size, self.size) - cluster * self.cluster_size

    def _count_absent(self) -> int:
        absent = self._tables.count_absent() * self.cluster_size
        return absent - self._padding() if absent else 0

    def _clipped(self, cluster: int, count: int, entry: int, offset: int, length: int) -> Run:
        """What of a run of clusters lies within a range."""
        start = cluster * self.cluster_size
        begin = max(offset, start)
        end = min(offset + length, start + count * self.cluster_size)
        if entry > ZERO:
            return Run(begin, end - begin, State.DATA, entry + begin - start)
        return Run(begin, end - begin, State.ABSENT if entry == ABSENT else State.ZERO)

    def _store(self, entries: list[tuple[int, int, int]], offset: int, view: memoryview) -> None:
        """Write data to where these runs are, or to new clusters."""
        self._changes += 1
        for cluster, count, entry in entries:
            run = self._clipped(cluster, count, entry, offset, len(view))
            piece = view[run.offset - offset :][: run.length]
            if run.file_offset is not None:
                self._storage.write(run.file_offset, piece)
            else:
                self._write_new(cluster, count, run.offset, piece, was=entry)

    def _write_new(self, cluster: int, count: int, offset: int, piece: memoryview, *, was: int) -> None:
        """Allocate clusters and store data in them; what it does not cover stays zeros."""
        place = self._tables.allocate(count)
        try:
            self._storage.write(place + offset - cluster * self.cluster_size, piece)
        except OSError:
            self._tables.give_back(place)
            raise
        self._set(cluster, count, place, was=was)

    def _set(self, cluster: int, count: int, entry: int, *, was: int) -> None:
        """Map clusters that were all absent, or all not; keep count of these."""
        absent, self._absent = self._absent, None  # if it fails half-way they are counted again
        self._tables.set(cluster, count, entry)
        if absent is not None:
            change = (entry == ABSENT) - (was == ABSENT)
            self._absent = absent + change * self._bytes(cluster, count)

    def _padding(self) -> int:
        """How many bytes the last cluster has that the disk has not, if it is absent."""
        last = self.header.clusters - 1
        (_, _, entry), *_ = self._tables.runs(last, last + 1)
        return self.cluster_size - self._bytes(last, 1) if entry == ABSENT else 0

    def _needs_fetch(self, offset: int, length: int) -> bool:
        """Tell what needs_fetch() does, for who holds the lock."""
        edges = self.edges(offset, length) if self.backings else []
        return any(entry == ABSENT for edge in edges for _, _, entry in self._entries(edge, 1))
