"""An open QED image: the guest's disk on top of header and tables (QED spec, "Tables")."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

from nbdserve.errors import ImageError
from overlay.image import Image, Run, State
from overlay.qed.check import check
from overlay.qed.header import Feature, read_header, write_header
from overlay.qed.tables import ABSENT, SLICE_ENTRIES, ZERO, Tables
from overlay.storage import Storage, open_file

_ZEROS = bytes(1 << 20)


class QedImage(Image):
    """A QED image. Clusters are allocated at the end of its file and never move.

    The feature NEED_CHECK, which QEMU sets when it does not order its writes, is never set here: data is
    durable before a table points to it, so that whatever interrupts us leaks clusters at worst.
    """

    def __init__(self, storage: Storage, path: str, *, writable: bool) -> None:
        """Open the image in a storage, which it closes in the end; ``path`` is for messages.

        A writable image that was not closed cleanly is checked first. Raises ImageError, OSError.
        """
        self._storage = storage
        self._path = path
        self._writable = writable
        self._closed = False
        self.header, self.backing = read_header(storage, path)
        if writable:
            self._take_over()
        self.size = self.header.image_size
        self.cluster_size = self.header.cluster_size
        self._tables = Tables(storage, self.header, path)

    @classmethod
    def open(cls, path: Path, *, writable: bool = False, force_share: bool = False) -> Self:
        """Open an image file under QEMU's image locks. Raises ImageError, OSError."""
        storage = open_file(path, writable=writable, force_share=force_share)
        try:
            return cls(storage, str(path), writable=writable)
        except BaseException:
            storage.close()
            raise

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """The runs that make up a range; see Image."""
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

    def read(self, offset: int, length: int) -> bytes:
        """Read a range that the image has; see Image."""
        parts = []
        for run in self.runs(offset, length):
            if run.file_offset is not None:
                parts.append(self._read_data(run.file_offset, run.length))
            elif run.state is State.ABSENT and self.backing is not None:
                raise self._absent(run.offset)
            else:
                parts.append(bytes(run.length))
        return b"".join(parts)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store data; see Image."""
        view = memoryview(data).cast("B")
        self._check_change(offset, len(view))
        for cluster, count, entry in list(self._clusters(offset, len(view))):
            run = self._clipped(cluster, count, entry, offset, len(view))
            piece = view[run.offset - offset :][: run.length]
            if run.file_offset is not None:
                self._storage.write(run.file_offset, piece)
            else:
                self._write_new(cluster, count, run.offset, piece)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros; see Image."""
        self._check_change(offset, length)
        for cluster, count, entry in self._clusters(offset, length):
            run = self._clipped(cluster, count, entry, offset, length)
            if run.file_offset is not None:
                for done in range(0, run.length, len(_ZEROS)):
                    self._storage.write(run.file_offset + done, _ZEROS[: run.length - done])
            elif run.state is State.ABSENT and self.backing is not None:
                for first in range(cluster, cluster + count, SLICE_ENTRIES):
                    self._set(first, min(SLICE_ENTRIES, cluster + count - first), ZERO)

    def commit(self) -> None:
        """Let the tables tell of every write so far; see Image."""
        if self._tables.is_dirty:
            self._tables.commit()

    def flush(self) -> None:
        """Commit, and return when everything is durable."""
        self.commit()
        self._storage.sync()

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

    def _clusters(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        end = -(-(offset + length) // self.cluster_size) if length else 0
        return self._tables.runs(offset // self.cluster_size, end)

    def _clipped(self, cluster: int, count: int, entry: int, offset: int, length: int) -> Run:
        """What of a run of clusters lies within a range."""
        start = cluster * self.cluster_size
        begin = max(offset, start)
        end = min(offset + length, start + count * self.cluster_size)
        if entry > ZERO:
            return Run(begin, end - begin, State.DATA, entry + begin - start)
        return Run(begin, end - begin, State.ABSENT if entry == ABSENT else State.ZERO)

    def _read_data(self, file_offset: int, length: int) -> bytes:
        data = self._storage.read(file_offset, length)
        if len(data) != length:
            raise OSError(
                errno.EIO, f"the file ends at {file_offset + len(data)}, within a cluster", self._path
            )
        return data

    def _write_new(self, cluster: int, count: int, offset: int, piece: memoryview) -> None:
        """Allocate clusters and store data in them; what it does not cover stays zeros."""
        place = self._tables.allocate(count)
        try:
            self._storage.write(place + offset - cluster * self.cluster_size, piece)
        except OSError:
            self._tables.give_back(place)
            raise
        self._set(cluster, count, place)

    def _set(self, cluster: int, count: int, entry: int) -> None:
        self._tables.set(cluster, count, entry)
        if self._tables.is_full:
            self._tables.commit()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(errno.EINVAL, f"{length} bytes at {offset} are not within the disk", self._path)

    def _check_change(self, offset: int, length: int) -> None:
        """Refuse what may not be written, before anything is."""
        if not self._writable:
            raise OSError(errno.EROFS, "the image is open for reading only", self._path)
        self._check_range(offset, length)
        if self.backing is None or not length:
            return
        end = offset + length
        edges = [offset] if offset % self.cluster_size else []
        edges += [end - 1] if end % self.cluster_size and end < self.size else []
        for edge in edges:
            if any(entry == ABSENT for _, _, entry in self._clusters(edge, 1)):
                raise self._absent(edge)

    def _absent(self, offset: int) -> OSError:
        start = offset - offset % self.cluster_size
        return OSError(
            errno.ENODATA, f"the cluster at {start} is in the backing, not in the image", self._path
        )
