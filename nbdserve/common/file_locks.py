"""Locks of an open file on a range of its bytes (fcntl(2), "Open file description locks").

The kernel drops them when the last descriptor of the open file is closed, also when the process is killed.
"""

from __future__ import annotations

import errno
import fcntl
import struct

READ, WRITE, NONE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
"""A lock that others may share, one that nobody may, and no lock."""

_FLOCK = struct.Struct("@hhqqi0q")
"""Linux's struct flock: type, whence, start, length, pid (0 for these locks)."""


def lock(descriptor: int, kind: int, start: int = 0, length: int = 0) -> None:
    """Lock a range of bytes, or give it back with NONE; length 0 is all from ``start`` on.

    Raises BlockingIOError when another open file holds a lock that forbids it, other OSErrors when the file
    system has no locks.
    """
    _fcntl(descriptor, fcntl.F_OFD_SETLK, kind, start, length)


def is_locked_by_another(descriptor: int, kind: int, start: int = 0, length: int = 0) -> bool:
    """Tell whether taking this lock would fail now; it is not taken. Raises OSErrors as ``lock`` does."""
    answer = _fcntl(descriptor, fcntl.F_OFD_GETLK, kind, start, length)
    return bool(_FLOCK.unpack(answer)[0] != NONE)


def _fcntl(descriptor: int, command: int, kind: int, start: int, length: int) -> bytes:
    try:
        return fcntl.fcntl(descriptor, command, _FLOCK.pack(kind, 0, start, length, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(*error.args) from error
        raise
