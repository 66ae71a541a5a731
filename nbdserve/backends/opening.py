"""Opening an image's file, and finding out whether it can be written."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from pathlib import Path

from nbdserve.common.errors import ImageError

_BLKROGET, _BLKSSZGET = 0x125E, 0x1268
"""ioctl(2) of a block device: whether it refuses writes, and the bytes of a logical sector (linux/fs.h)."""

_ADVICE = "serve it read-only (-r)"
_NOT_WRITABLE = (errno.EROFS, errno.EPERM, errno.EACCES)


def open_image(path: Path, *, read_only: bool, follow_links: bool) -> int:
    """Open a file or block device; the descriptor is the caller's.

    Raises ImageError when it can only be read but is to be written too, other OSErrors as open(2) has them.
    """
    # A pipe must not be waited for: it is no image.
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW)
    except OSError as error:
        if read_only or error.errno not in _NOT_WRITABLE or not os.access(path, os.R_OK):
            raise
        raise ImageError(f"{path}: cannot be opened for writing: {error.strerror}: {_ADVICE}") from error
    try:
        # Linux opens a read-only device for writing, and then refuses the writes.
        if not read_only and is_read_only_device(descriptor):
            raise ImageError(f"{path}: the device is not writable: {_ADVICE}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def may_keep_old_pages(path: Path) -> bool:
    """Tell whether what the page cache has of an image may be older than what is there, and can be avoided.

    Of a block device, and of a file on FUSE, Linux (6.18) may keep a page that was read while a QEMU with
    ``cache=none,aio=native`` wrote it, with what was there before: who reads through the page cache is told
    that long after the write has ended. In files of ext4, XFS and Btrfs the page is dropped when it ends.
    """
    try:
        status = path.stat()
        if stat.S_ISBLK(status.st_mode):
            return True
        if not _is_on_fuse(status.st_dev):
            return False
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        # Who opens it says why; where there is no direct access no guest has it either.
        return False
    return True


def _is_on_fuse(device: int) -> bool:
    """Whether a file system is in user space, or beyond the virtual machine: FUSE, whatever is behind it."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            # proc(5): ID PARENT MAJOR:MINOR ROOT PLACE OPTIONS [FIELDS] - TYPE SOURCE OPTIONS
            before, _, behind = line.partition(" - ")
            if before.split(" ")[2] == number:
                return behind.startswith(("fuse", "virtiofs"))
    return False


def logical_sector(descriptor: int) -> int:
    """Return the bytes of a block device's logical sector, of which direct access takes multiples."""
    return _asked(descriptor, _BLKSSZGET)


def is_read_only_device(descriptor: int) -> bool:
    """Tell whether this is a block device that takes no writes: the disk, or only this partition of it."""
    if not stat.S_ISBLK(os.fstat(descriptor).st_mode):
        return False
    return _asked(descriptor, _BLKROGET) != 0


def _asked(device: int, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(device, request, bytes(4)), sys.byteorder)
