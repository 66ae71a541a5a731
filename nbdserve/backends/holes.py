"""Linux's fallocate(2), which Python's os module does not have."""

from __future__ import annotations

import ctypes
import os
from enum import IntFlag


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
        if number != 4:  # EINTR
            raise OSError(number, os.strerror(number))
