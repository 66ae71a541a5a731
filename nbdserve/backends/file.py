"""Raw files and block devices, served straight from the page cache."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nbdserve.backends.base import Backend, Buffer, Capabilities
from nbdserve.backends.holes import DataFinder, Mode, next_data, try_fallocate
from nbdserve.backends.offset import WHOLE, Slice
from nbdserve.backends.opening import open_image
from nbdserve.backends.splicing import FileRange
from nbdserve.common.errors import ImageError
from nbdserve.protocol.constants import Command, ExtentFlags
from nbdserve.protocol.extents import Extent
from nbdserve.protocol.offers import ALLOCATION_DEPTH, BASE_ALLOCATION, BlockSizes

HOLE = int(ExtentFlags.HOLE | ExtentFlags.ZERO)
DATA = int(ExtentFlags.DATA)
_ZEROES = bytes(1 << 20)


class FileBackend(Backend):
    """A raw image in a file or on a block device. Holes, too, are in it and not in a backing: depth 1.

    ``discard=False`` turns trims into nothing, as ``qemu-nbd --discard=ignore`` does; ``follow_links=False``
    refuses a path that is a symbolic link.
    Raises ImageError when the file is of no kind that can be served, or can only be read; OSError when it
    cannot be opened.
    """

    contexts = (BASE_ALLOCATION, ALLOCATION_DEPTH)

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool,
        part: Slice = WHOLE,
        discard: bool = True,
        follow_links: bool = True,
    ) -> None:
        self.path = path
        self._fd = open_image(path, read_only=read_only, follow_links=follow_links)
        self._data = DataFinder()
        try:
            self._base = part.offset
            self.size = _size_of(self._fd, path, part)
        except BaseException:
            os.close(self._fd)
            raise
        self._discard = discard
        self.block_sizes = BlockSizes()
        self.capabilities = Capabilities(read_only=read_only, cache=True, fast_zero=True, multi_conn=True)

    def fileno(self) -> int:
        """Return the descriptor, for image locks."""
        return self._fd

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer; a file that has shrunk is EIO, never zeroes."""
        count = os.preadv(self._fd, (buffer,), self._base + offset)
        while count < len(buffer):
            more = os.preadv(self._fd, (buffer[count:],), self._base + offset + count)
            if not more:
                raise OSError(errno.EIO, f"{self.path} ends before offset {self._base + offset + count}")
            count += more

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Write all of ``data``."""
        position = self._base + offset
        if fua:
            count = os.pwritev(self._fd, (data,), position, os.RWF_DSYNC)
        else:
            count = os.pwrite(self._fd, data, position)
        if count < len(data):
            # The disk is full, say; the next attempt fails with the reason.
            if not count:
                raise OSError(errno.EIO, f"{self.path} takes no bytes at offset {position}")
            self.write(offset + count, memoryview(data)[count:], fua)

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Read it: no network is waited for. What comes short is read again, which tells the reason."""
        if os.preadv(self._fd, (buffer,), self._base + offset) < len(buffer):
            self.read_into(offset, buffer)
        return True

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Write it: the page cache takes it. What is not taken whole is written again."""
        if os.pwrite(self._fd, data, self._base + offset) < len(data):
            self.write(offset, data, fua=False)
        return True

    def log_writes(self) -> None:
        """Do nothing: the kernel has what was written."""

    def zero(self, offset: int, length: int, fua: bool, may_trim: bool, fast: bool) -> None:
        """Zero by fallocate where the file system can, by writing where it cannot."""
        if length and not self._zero_by_fallocate(offset, length, may_trim):
            if fast:
                raise OSError(errno.ENOTSUP, "no fast way to zero here")
            self._zero_by_writing(offset, length)
        if fua:
            self.flush()

    def _zero_by_fallocate(self, offset: int, length: int, may_trim: bool) -> bool:
        modes = [Mode.ZERO_RANGE | Mode.KEEP_SIZE]
        if may_trim and self._discard:
            modes.insert(0, Mode.PUNCH_HOLE | Mode.KEEP_SIZE)
        for mode in modes:
            if try_fallocate(self._fd, mode, self._base + offset, length):
                self._data.note_hole()
                return True
        return False

    def _zero_by_writing(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            piece = memoryview(_ZEROES)[: min(len(_ZEROES), end - offset)]
            FileBackend.write(self, offset, piece, fua=False)
            offset += len(piece)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Punch a hole; a file system that cannot keeps the data, which a trim allows."""
        if length and self._discard:
            mode = Mode.PUNCH_HOLE | Mode.KEEP_SIZE
            if try_fallocate(self._fd, mode, self._base + offset, length):
                self._data.note_hole()
        if fua:
            self.flush()

    def cache(self, offset: int, length: int) -> None:
        """Ask the kernel to read ahead."""
        os.posix_fadvise(self._fd, self._base + offset, length, os.POSIX_FADV_WILLNEED)

    def flush(self) -> None:
        """Flush data, and the metadata that is needed to read it back."""
        os.fdatasync(self._fd)

    def extents(self, offset: int, length: int, context: str) -> Iterator[Extent]:
        """Tell data from holes by SEEK_DATA and SEEK_HOLE; without them all is data.

        A file that has shrunk is EIO: what follows its end is no hole.
        """
        if context == ALLOCATION_DEPTH:
            yield Extent(length, 1)
            return
        position, end = self._base + offset, self._base + offset + length
        while position < end:
            run = self._data.find(self._fd, position, end)
            if run is None:
                self._require(end)
                yield Extent(end - position, HOLE)
                return
            begin, stop = run
            if begin > position:
                yield Extent(begin - position, HOLE)
                position = begin
            yield Extent(min(stop, end) - position, DATA)
            position = min(stop, end)

    def _require(self, end: int) -> None:
        """Raise EIO unless the file still reaches to ``end``."""
        if os.lseek(self._fd, 0, os.SEEK_END) < end:
            raise OSError(errno.EIO, f"{self.path} ends before offset {end}")

    def reads_as_zeroes(self, offset: int, length: int) -> bool:
        """Tell whether the range lies in a hole. Looks for data only: finding its end can take long."""
        position = self._base + offset
        data = next_data(self._fd, position)
        if data is None:
            # No data up to the end; a file that has shrunk ends too early.
            return os.lseek(self._fd, 0, os.SEEK_END) >= position + length
        return data >= position + length

    def file_range(self, offset: int) -> FileRange | None:
        """Return the file as it is."""
        return FileRange(self._fd, self._base + offset)

    def write_range(self, offset: int) -> FileRange | None:
        """Return the same file."""
        return self.file_range(offset)

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """Say yes but to a flush, which waits for the disk while reads from the page cache could go on."""
        return command != Command.FLUSH

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _size_of(descriptor: int, path: Path, part: Slice) -> int:
    """How many bytes of the opened file are served."""
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ImageError(f"{path}: not a regular file or block device, name one of those")
    return part.length_within(os.lseek(descriptor, 0, os.SEEK_END), str(path))
