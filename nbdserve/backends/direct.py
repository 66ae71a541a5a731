"""Raw files and block devices past the page cache (O_DIRECT): ``--cache=none`` and ``directsync``.

The kernel takes only aligned memory, offsets and lengths. Everything goes through an aligned bounce buffer,
and what a request covers only in part is read first. The last bytes of a file whose size is not aligned have
no place in this: they always go through the page cache, so that the file keeps its size. Those of a block
device are only written so, and read from the disk like all others.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from nbdserve.backends.base import Buffer
from nbdserve.backends.file import FileBackend
from nbdserve.backends.offset import WHOLE, Slice
from nbdserve.backends.opening import logical_sector
from nbdserve.backends.splicing import FileRange
from nbdserve.common.errors import ImageError
from nbdserve.protocol.constants import Command

ALIGNMENT = 4096
"""Bytes; few disks ask for more."""


class DirectBackend(FileBackend):
    """A raw image, read from and written to the disk itself.

    Raises what FileBackend does, and ImageError where the file system has no direct access.
    """

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool,
        part: Slice = WHOLE,
        discard: bool = True,
        follow_links: bool = True,
    ) -> None:
        super().__init__(path, read_only=read_only, part=part, discard=discard, follow_links=follow_links)
        try:
            flags = os.O_RDONLY if read_only else os.O_RDWR
            self._direct = os.open(f"/proc/self/fd/{self.fileno()}", flags | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            super().close()
            if error.errno != errno.EINVAL:
                raise
            raise ImageError(
                f"{path}: its file system has no direct access (O_DIRECT): use --cache=writeback"
            ) from error
        end, is_device = os.lseek(self._direct, 0, os.SEEK_END), stat.S_ISBLK(os.fstat(self._direct).st_mode)
        self._block = max(ALIGNMENT, logical_sector(self._direct)) if is_device else ALIGNMENT
        # Up to here the file consists of whole blocks.
        self._border = end // self._block * self._block
        self._border_of_reads = end if is_device else self._border
        self._ranges = Ranges()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer."""
        begin, end = self._base + offset, self._base + offset + len(buffer)
        border = max(begin, min(end, self._border_of_reads))
        if begin < border:
            start, stop = self._outwards(begin, border)
            blocks = _aligned(stop - start)
            self._read_blocks(start, blocks, border - start)
            buffer[: border - begin] = blocks[begin - start : border - start]
        if border < end:
            super().read_into(border - self._base, buffer[border - begin :])

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Write all of ``data``."""
        view = memoryview(data)
        begin, end = self._base + offset, self._base + offset + len(view)
        border = max(begin, min(end, self._border))
        if begin < border:
            self._write_through_blocks(begin, view[: border - begin], fua)
        if border < end:
            super().write(border - self._base, view[border - begin :], fua)

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Refuse: every access waits for the disk."""
        return False

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Refuse, too."""
        return False

    def _write_through_blocks(self, begin: int, data: memoryview, fua: bool) -> None:
        end = begin + len(data)
        start, stop = self._outwards(begin, end)
        whole = start == begin and stop == end
        blocks = _aligned(stop - start)
        with self._ranges.held(start, stop, alone=not whole):
            if start < begin:
                self._read_blocks(start, blocks[: self._block])
            if end < stop and (stop - start > self._block or start == begin):
                self._read_blocks(stop - self._block, blocks[-self._block :])
            blocks[begin - start : end - start] = data
            flags = os.RWF_DSYNC if fua else 0
            position = 0
            while position < len(blocks):
                count = os.pwritev(self._direct, (blocks[position:],), start + position, flags)
                if count % self._block or not count:
                    raise OSError(errno.EIO, f"{self.path} takes only {count} bytes at {start + position}")
                position += count

    def _read_blocks(self, start: int, blocks: memoryview, wanted: int | None = None) -> None:
        """Fill the blocks; or only so many bytes, where the last block may be cut off by the device's end."""
        position, needed = 0, len(blocks) if wanted is None else wanted
        while position < needed:
            count = os.preadv(self._direct, (blocks[position:],), start + position)
            if not count or (count % self._block and position + count < needed):
                raise OSError(errno.EIO, f"{self.path} ends before offset {start + needed}")
            position += count

    def zero(self, offset: int, length: int, fua: bool, may_trim: bool, fast: bool) -> None:
        """Zero as in the page cache; the kernel keeps both in step."""
        with self._held(offset, length):
            super().zero(offset, length, fua, may_trim, fast)

    def cache(self, offset: int, length: int) -> None:
        """Do nothing: nobody here reads from the page cache."""

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Trim as in the page cache; the kernel keeps both in step."""
        with self._held(offset, length):
            super().trim(offset, length, fua)

    def file_range(self, offset: int) -> FileRange | None:
        """Nobody is to read this file through the page cache."""
        return None

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """Nothing is: every access waits for the disk."""
        return False

    def close(self) -> None:
        """Close the file."""
        os.close(self._direct)
        super().close()

    def _outwards(self, begin: int, end: int) -> tuple[int, int]:
        """The smallest range of whole blocks around a range."""
        return begin // self._block * self._block, -(-end // self._block) * self._block

    def _held(self, offset: int, length: int) -> contextlib.AbstractContextManager[None]:
        return self._ranges.held(
            *self._outwards(self._base + offset, self._base + offset + length), alone=True
        )


class Ranges:
    """Keeps those who write a block only in part apart from everybody else who writes it.

    Between reading and writing such a block, another's write to it would be lost.
    """

    def __init__(self) -> None:
        self._held: list[tuple[int, int, bool]] = []
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def held(self, start: int, stop: int, *, alone: bool) -> Iterator[None]:
        """Wait until the range is free of those who want to be alone there, or of all if this one does."""
        mine = (start, stop, alone)
        with self._changed:
            self._changed.wait_for(lambda: not any(_collide(mine, other) for other in self._held))
            self._held.append(mine)
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(mine)
                self._changed.notify_all()


def _collide(one: tuple[int, int, bool], other: tuple[int, int, bool]) -> bool:
    return one[0] < other[1] and other[0] < one[1] and (one[2] or other[2])


def _aligned(length: int) -> memoryview:
    """Memory that starts with a page."""
    return memoryview(mmap.mmap(-1, length))
