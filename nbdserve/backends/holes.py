"""Holes in files and block devices: how they are made, and how they are found.

fallocate(2) is bound here, as Python's os module does not have it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
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


REMEMBERED = 0.5
"""Seconds for which the end of a run of data is remembered."""

_NO_RUN = (0, 0, 0.0)


class DataFinder:
    """Looks for the data of one file, and remembers for a moment the run that it found last.

    Who wants to know asks for one small part after the other, and each look may take as long as the data is
    long. A hole that somebody else makes meanwhile is told as data, which is always true. May be used by
    several threads.
    """

    def __init__(self) -> None:
        self._run = _NO_RUN
        self._holes = 0

    def find(self, descriptor: int, position: int, end: int) -> tuple[int, int] | None:
        """Find a run of data as find_data(); it may begin before ``position``, if that is in it."""
        begin, stop, until = self._run
        if begin <= position < stop and time.monotonic() <= until:
            return begin, stop
        holes = self._holes
        run = find_data(descriptor, position, end)
        if run is not None and holes == self._holes:
            self._run = (*run, time.monotonic() + REMEMBERED)
        return run

    def note_hole(self) -> None:
        """There may be holes where data was. To be called when they are made."""
        self._holes += 1
        self._run = _NO_RUN


def _seek(descriptor: int, position: int, whence: int, default: int) -> int | None:
    try:
        return os.lseek(descriptor, position, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        if error.errno in UNSUPPORTED:
            return default
        raise
