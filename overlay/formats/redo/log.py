"""The redo log beside the image of a mirror: a batch of changes is taken over as a whole, or not at all.

A batch is stored in the log first, wherever its chunks come from and in whatever order. When it is committed
all of it is checked and synced, and only then applied to the image. So at any instant log and image together
are the disk as of one point: an image is never looked at before the batches of its log have been applied
once more, which changes nothing where they had been.

When the log has grown the image is flushed and the log emptied; its positions go on from where it was.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from dataclasses import replace
from threading import Lock
from uuid import UUID
from zlib import crc32

from nbdserve.common.errors import ImageError
from overlay.formats.image import Buffer, Image
from overlay.formats.redo.chunks import (
    CHUNK_HEADER_BYTES,
    NOBODY,
    PAGE,
    ChunkHeader,
    Header,
    Point,
    read_chunk_header,
    read_header,
    records,
)
from overlay.formats.storage import Storage

_LOG = logging.getLogger("nbd-overlay")

CHECKPOINT = 64 << 20
"""Bytes of batches from which on the image is flushed, and the log emptied."""
_SLACK = 1 << 30


def longest_batch(size: int) -> int:
    """Tell how many bytes a batch may have for a disk of ``size`` bytes: twice that, and 1 GiB."""
    return 2 * size + _SLACK


def begin_log(file: Storage, size: int, image: UUID) -> None:
    """Make an empty log, durably."""
    file.truncate(0)
    file.write(0, Header(size, image).pack())
    file.sync()


class Batches:
    """What lies in the file of a log that has this header, for a disk of ``size`` bytes."""

    def __init__(self, file: Storage, header: Header, size: int, path: str) -> None:
        self._file, self._size, self._path = file, size, path
        self.header = header

    def place(self, position: int) -> int:
        """Tell where a position is in the file."""
        return PAGE + position - self.header.position

    def chunk_at(self, position: int) -> tuple[ChunkHeader, bytes] | None:
        """Return the chunk at a position, if there is one whose bytes are right."""
        raw = self._file.read(self.place(position), CHUNK_HEADER_BYTES)
        head = read_chunk_header(raw, position)
        if head is None:
            return None
        payload = self._file.read(self.place(position) + CHUNK_HEADER_BYTES, head.length)
        return (head, payload) if len(payload) == head.length and crc32(payload) == head.crc else None

    def batch_at(self, position: int, before: Point) -> tuple[int, Point] | None:
        """Tell where the batch that begins here ends, and its point; None unless it is whole and right.

        ``before`` is the point of the batch before it.
        """
        batch: UUID | None = None
        while found := self.chunk_at(position):
            head, payload = found
            batch = batch or head.batch
            if head.batch != batch:
                return None
            try:
                for _ in records(payload, self._size):
                    pass
            except ImageError as error:
                _LOG.error("%s: %s: it is not taken over", self._path, error)
                return None
            position = head.end
            if head.point is not None:
                return (position, head.point) if head.point.number > before.number else None
        return None

    def last(self) -> tuple[int, Point]:
        """Tell where the last whole batch ends, and its point."""
        end, point = self.header.position, self.header.point
        while batch := self.batch_at(end, point):
            end, point = batch
        return end, point


class RedoLog:
    """An open log, and the image that it belongs to; it owns neither.

    Safe for several threads: its lock is held while a batch is checked and applied, as nothing else may
    happen to either meanwhile.
    """

    def __init__(self, file: Storage, image: Image, uuid: UUID, path: str) -> None:
        """Read the log and apply what was committed. Raises ImageError if it is not this image's, OSError."""
        self._file, self._image, self._path = file, image, path
        header = read_header(file.read(0, PAGE), path)
        if header.image != uuid or header.size != image.size:
            raise ImageError(f"{path}: the redo log belongs to another image: put the right one there")
        self._batches = Batches(file, header, image.size, path)
        self._lock = Lock()
        self._applied = header.position
        self._end, self._point = self._batches.last()
        # Whoever stored the last batch may have been killed before that was durable.
        file.sync()
        self._apply()
        self._checkpoint()

    @property
    def _header(self) -> Header:
        return self._batches.header

    @property
    def point(self) -> Point:
        """Return what image and log hold."""
        return self._point

    def tell(self) -> bytes:
        """Return the page that a receiver shows: whose mirror this is, and where the next batch begins."""
        with self._lock:
            return replace(self._header, position=self._end, point=self._point).tell()

    def store(self, position: int, data: Buffer) -> None:
        """Keep a part of a batch that is not committed yet; OSError, EINVAL, where no such batch can be."""
        with self._lock:
            if not self._end <= position <= self._end + longest_batch(self._image.size) - len(data):
                raise OSError(errno.EINVAL, f"no batch can be at {position} now", self._path)
            self._file.write(self._batches.place(position), data)

    def sync(self) -> None:
        """Let what was stored be durable, so that a commit takes no longer than it must."""
        self._file.sync()

    def commit(self, source: UUID, end: int) -> None:
        """Let the disk be as of the batch that ends at ``end``. The second time nothing happens.

        Raises OSError: EPERM where another image's writes come here, EINVAL unless all of the batch is
        stored, else what log or image say. After that the batch counts, or it does not, as a whole.
        """
        with self._lock:
            if self._header.source not in (NOBODY, source):
                raise OSError(errno.EPERM, f"it mirrors {self._header.source}, not {source}", self._path)
            if end == self._end:
                self._apply()
                return
            batch = self._batches.batch_at(self._end, self._point)
            if batch is None or batch[0] != end:
                raise OSError(errno.EINVAL, f"no whole batch ends at {end}", self._path)
            self._apply()  # what could not be before: never a batch before the one that it follows
            if self._header.source == NOBODY:
                self._write_header(replace(self._header, source=source))
            self._file.sync()
            self._end, self._point = batch
            self._apply()
            if self._end - self._header.position >= CHECKPOINT:
                self._checkpoint()

    def close(self) -> None:
        """Let the image hold everything, durably. OSError where that fails: the next who opens it goes on."""
        with self._lock:
            self._apply()
            self._checkpoint()

    def _committed(self) -> Iterator[tuple[int, bytes]]:
        """The end and the payload of each chunk that was committed and has not been applied."""
        position = self._applied
        while position < self._end:
            found = self._batches.chunk_at(position)
            if found is None:
                raise OSError(errno.EIO, f"the log cannot be read again at {position}", self._path)
            position = found[0].end
            yield position, found[1]

    def _apply(self) -> None:
        for end, payload in self._committed():
            for offset, length, data in records(payload, self._image.size):
                # Whole grains need no fetch.
                done = self._image.zero(offset, length) if data is None else self._image.write(offset, data)
                if not done:
                    raise OSError(errno.EINVAL, f"{length} bytes at {offset} are not whole", self._path)
            self._image.commit()
            self._applied = end

    def _checkpoint(self) -> None:
        """Empty the log, once the image holds durably what was in it."""
        self._image.flush()
        # Who finds the old header finds the old batches, too: they are cut off only after the new one.
        self._write_header(replace(self._header, position=self._end, point=self._point))
        self._file.truncate(PAGE)

    def _write_header(self, header: Header) -> None:
        self._file.write(0, header.pack())
        self._file.sync()
        self._batches.header = header
