"""Holes in files and block devices: how they are made, and how they are found.

fallocate(2) is bound here, as Python's os module does not have it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from enum import IntFlag

UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL)
"""What a file system answers to what it cannot do; EINVAL a block device, to ranges not of whole sectors."""


class Mode(IntFlag):
    """Modes of fallocate(2) (linux/falloc.h)."""

    ALLOCATE = 0
    KEEP_SIZE = 0x01
    PUNCH_HOLE = 0x02
    ZERO_RANGE = 0x10


def _bind() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True).fallocate64
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    return function


_fallocate = _bind()


def fallocate(descriptor: int, mode: Mode, offset: int, length: int) -> None:
    """Call fallocate(2); OSError with its errno when it fails."""
    while _fallocate(descriptor, int(mode), offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def try_fallocate(descriptor: int, mode: Mode, offset: int, length: int) -> bool:
    """Do the same; False, with nothing done, where the file system or the device cannot do it."""
    try:
        fallocate(descriptor, mode, offset, length)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def next_data(descriptor: int, position: int) -> int | None:
    """Find where the next data begins: None behind the last, ``position`` where the file cannot tell.

    Raises OSError when the file cannot be read.
    """
    return _seek(descriptor, position, os.SEEK_DATA, default=position)


def find_data(descriptor: int, position: int, end: int) -> tuple[int, int] | None:
    """Find the first run of data that begins before ``end``, and where it ends, which may be behind that.

    None if there is none. Where the file cannot tell all is data. May be slow: on tmpfs finding the end takes
    as long as the data is long. Raises OSError when the file cannot be read.
    """
    begin = next_data(descriptor, position)
    if begin is None or begin >= end:
        return None
    hole = _seek(descriptor, begin, os.SEEK_HOLE, default=end)
    return begin, end if hole is None else hole


def _seek(descriptor: int, position: int, whence: int, default: int) -> int | None:
    try:
        return os.lseek(descriptor, position, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno in UNSUPPORTED:
            return default
        raise
