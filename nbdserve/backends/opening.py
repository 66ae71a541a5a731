"""Opening an image's file, and finding out whether it can be written."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from pathlib import Path

from nbdserve.common.errors import ImageError

_BLKROGET = 0x125E
"""ioctl(2) of a block device: whether writes to it are refused (linux/fs.h)."""

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
        if not read_only and _is_read_only_device(descriptor):
            raise ImageError(f"{path}: the device is not writable: {_ADVICE}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_read_only_device(descriptor: int) -> bool:
    """Whether this is a block device that takes no writes: the disk, or only this partition of it."""
    if not stat.S_ISBLK(os.fstat(descriptor).st_mode):
        return False
    answer = fcntl.ioctl(descriptor, _BLKROGET, bytes(4))
    return int.from_bytes(answer, sys.byteorder) != 0
