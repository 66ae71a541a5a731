"""What lies under an image: a file with random access, or a simulated disk in its place."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from nbdserve.backends.holes import DataFinder, Mode, try_fallocate
from nbdserve.backends.imagelocks import EXCLUSIVE, READER, WRITER, ImageLocks, Permission
from nbdserve.common.errors import ImageError
from nbdserve.common.ownership import Ownership

_ZEROS = bytes(1 << 20)
_PIECE = 128 << 10
"""Bytes of one system call that writes. A longer one lets the file system take memory for the page cache in
blocks of 2 MiB, which in a virtual machine whose host takes free memory back costs ten times the copying."""


class Storage(Protocol):
    """A growing sequence of bytes. Offsets and lengths are in bytes; every failure is an OSError.

    What was written is sure to survive a power cut only after the next ``sync`` has returned. If a sync fails
    nobody knows what the disk holds, so from then on every change and every sync fails.
    """

    zero_step: int
    """Most bytes that one ``zero`` is to be given while others wait: it may take as long as writing them."""

    def size(self) -> int:
        """Return the length of the file."""

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes, fewer only where the file ends."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer; EIO if the file ends before."""

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of the data; beyond the end the file grows."""

    def zero(self, offset: int, length: int) -> None:
        """Make a range within the file read as zeros, and occupy nothing if that is possible."""

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what is not surely a hole in a range, in order. May be slow."""

    def truncate(self, size: int) -> None:
        """Cut the file off, or let it grow by bytes that read as zeros and occupy nothing."""

    def sync(self) -> None:
        """Return when everything written before is durable (fdatasync)."""

    def fileno(self) -> int | None:
        """Return the file's descriptor, if there is one."""

    def share(self) -> None:
        """Give back the locks that keep other processes away."""

    def close(self) -> None:
        """Free the file; without ``sync`` nothing becomes durable by that."""


class FileStorage:
    """A regular file, with QEMU's image locks held on it for as long as it is open."""

    zero_step = 1 << 40

    def __init__(self, fd: int, path: Path, locks: ImageLocks | None = None) -> None:
        """Take over an open descriptor and its locks; most callers want :func:`open_file`."""
        self.path = path
        self._fd = fd
        self._locks = locks
        self._finder = DataFinder()
        self._sync_failed = False

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def size(self) -> int:
        """Return the length of the file in bytes."""
        return os.fstat(self._fd).st_size

    def allocated(self) -> int:
        """Return the bytes that the file occupies in its file system."""
        return os.fstat(self._fd).st_blocks * 512

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes, fewer only where the file ends."""
        parts: list[bytes] = []
        try:
            while length:
                data = os.pread(self._fd, length, offset)
                if len(data) == length and not parts:
                    return data
                if not data:
                    break
                # A signal, or the 2 GiB that Linux moves at once, may have cut the call short.
                parts.append(data)
                offset, length = offset + len(data), length - len(data)
        except OSError as error:
            raise self._named(error) from error
        return b"".join(parts)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer; EIO if the file ends before, never zeros."""
        try:
            count = os.preadv(self._fd, (buffer,), offset)
            while count < len(buffer):
                more = os.preadv(self._fd, (buffer[count:],), offset + count)
                if not more:
                    raise OSError(errno.EIO, f"the file ends at {offset + count}, within the data")
                count += more
        except OSError as error:
            raise self._named(error) from error

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of the data; OSError, with part of it written, if the disk is full or fails."""
        self._refuse_after_failed_sync()
        try:
            if len(data) <= _PIECE:
                written = os.pwrite(self._fd, data, offset)
            else:
                data, written = memoryview(data).cast("B"), 0
            while written < len(data):
                written += os.pwrite(self._fd, data[written : written + _PIECE], offset + written)
        except OSError as error:
            raise self._named(error) from error

    def zero(self, offset: int, length: int) -> None:
        """Punch a hole; write zeros where the file system has none."""
        self._refuse_after_failed_sync()
        try:
            is_done = self._unmap(offset, length)
        except OSError as error:
            raise self._named(error) from error
        self._finder.note_hole()
        for done in range(0, 0 if is_done else length, len(_ZEROS)):
            self.write(offset + done, memoryview(_ZEROS)[: length - done])

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield what SEEK_DATA and SEEK_HOLE tell; everything where they do not work."""
        end = offset + length
        while offset < end:
            try:
                run = self._finder.find(self._fd, offset, end)
            except OSError as error:
                raise self._named(error) from error
            if run is None:
                return
            begin, stop = max(run[0], offset), run[1]
            offset = min(stop, end)
            yield begin, offset - begin

    def truncate(self, size: int) -> None:
        """Set the length of the file."""
        self._refuse_after_failed_sync()
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise self._named(error) from error
        self._finder.note_hole()

    def sync(self) -> None:
        """Return when the file's content, and its length, are durable."""
        self._refuse_after_failed_sync()
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._sync_failed = True
            raise self._named(error) from error

    def share(self) -> None:
        """Give QEMU's image locks back."""
        if self._locks is not None:
            self._locks.release()

    def close(self) -> None:
        """Close the descriptor, which also gives the image locks back."""
        os.close(self._fd)

    def _unmap(self, offset: int, length: int) -> bool:
        """Make zeros without writing them; False, with nothing done, where that cannot be."""
        return try_fallocate(self._fd, Mode.PUNCH_HOLE | Mode.KEEP_SIZE, offset, length)

    def _named(self, error: OSError) -> OSError:
        """The same error with the file's name."""
        return OSError(error.errno, error.strerror, str(self.path))

    def _refuse_after_failed_sync(self) -> None:
        """Linux reports a failed write-back once, and then forgets the data: a second sync would lie."""
        if self._sync_failed:
            raise OSError(errno.EIO, "writing back to the disk has failed before", str(self.path))


def open_file(path: Path, *, writable: bool = False, force_share: bool = False) -> FileStorage:
    """Open an existing image file under QEMU's image locks.

    ``force_share`` reads an image that a QEMU may be writing to; what is read then need not be consistent.
    Raises ImageError if the file is missing, not a regular file or in use.
    """
    _refuse_special(path)
    fd = open_descriptor(path, os.O_RDWR if writable else os.O_RDONLY)
    _require_file(fd, path)
    return FileStorage(
        *locked(fd, path, WRITER if writable else READER, Permission.NONE if force_share else EXCLUSIVE)
    )


def create_file(path: Path, *, replace: bool = False, whose: Ownership | None = None) -> FileStorage:
    """Make a new, empty image file, or empty an existing one that nobody uses (``replace``).

    It is whose it should be (``whose``) before anything is in it. Raises ImageError if the file exists and is
    not to be replaced, is in use, or cannot be made, OperatorError if it cannot be given to its owner.
    """
    flags = os.O_RDWR | os.O_CREAT | (0 if replace else os.O_EXCL)
    _refuse_special(path)
    fd = open_descriptor(path, flags, 0o600 if whose else 0o644)
    try:
        _require_file(fd, path)
        storage = FileStorage(*locked(fd, path, WRITER, EXCLUSIVE))
        try:
            if whose:
                whose.apply(fd, path)
        except BaseException:
            storage.close()
            raise
    except BaseException:
        if not replace:
            path.unlink()
        raise
    storage.truncate(0)
    return storage


def sync_directory(path: Path) -> None:
    """Make the names of the files in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_descriptor(path: Path, flags: int, mode: int = 0o644) -> int:
    """Open what is to be an image; ImageError says why it cannot be."""
    try:
        # Non-blocking, so that a FIFO is refused later instead of waited for here.
        return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, mode)
    except OSError as error:
        advice = {
            errno.ENOENT: "no such file or directory; check the path",
            errno.EEXIST: "the file exists; choose another name, or --force to overwrite it",
            errno.EISDIR: "a directory, not an image",
            errno.EBUSY: "the device is in use: mounted, or held by another device or program (see lsblk); "
            "free it, or take another",
        }
        reason = advice.get(error.errno or 0, f"cannot be opened: {error.strerror}")
        raise ImageError(f"{path}: {reason}") from error


def locked(fd: int, path: Path, used: Permission, unshared: Permission) -> tuple[int, Path, ImageLocks]:
    """Take the locks, or close the descriptor and say why not: what a storage is made of."""
    try:
        locks = ImageLocks(fd, str(path))
        locks.hold(used, unshared)
    except BaseException:
        os.close(fd)
        raise
    return fd, path, locks


def _refuse_special(path: Path) -> None:
    """Refuse what may do something as soon as it is opened, as a watchdog: a guest can write such a name into
    a trailer, see cli/discard.py.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # who opens it says why
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _no_file(path)


def _require_file(fd: int, path: Path) -> None:
    """Close a descriptor of anything else, and say so."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _no_file(path)


def _no_file(path: Path) -> ImageError:
    return ImageError(f"{path}: not a regular file; an overlay image needs one, as it grows")
