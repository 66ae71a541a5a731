"""Long reads without copying: pages go from the page cache through a pipe to the socket, as references."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import NamedTuple

CAPACITY = 1 << 20
"""Bytes that the pipe should hold: what an unprivileged process may ask for (/proc/sys/fs/pipe-max-size)."""

PAGE = 4096
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class FileRange(NamedTuple):
    """Where bytes lie in an open file of this machine."""

    descriptor: int
    offset: int


class Pipe:
    """A pipe that is filled from a file and then emptied into a socket, by splice(2).

    It is filled first, so that an error of the disk is known before the reply's header is sent. What is sent
    are references to pages: a write that comes while the reply is on its way may be seen in it, as a read and
    a write that are under way at the same time may be served in either order.
    """

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe2(os.O_CLOEXEC)
        try:
            self.capacity = fcntl.fcntl(self._write_end, fcntl.F_SETPIPE_SZ, CAPACITY)
        except OSError:
            # A user has a quota of pipe buffers; a pipe as it comes does too, if more slowly.
            self.capacity = fcntl.fcntl(self._write_end, fcntl.F_GETPIPE_SZ)

    def most(self, offset: int) -> int:
        """Bytes that fit from a file offset on; a page of which only a part counts takes a whole place."""
        return self.capacity - offset % PAGE

    def fill(self, source: FileRange, length: int) -> bool:
        """Take ``length`` bytes, at most ``most``, from the file; False where its file system cannot do that.

        Raises OSError when they cannot be read, EIO when the file ends before. The pipe is empty then.
        """
        taken = 0
        try:
            while taken < length:
                count = os.splice(
                    source.descriptor,
                    self._write_end,
                    length - taken,
                    offset_src=source.offset + taken,
                    flags=os.SPLICE_F_NONBLOCK,
                )
                if not count:
                    raise OSError(errno.EIO, f"the file ends before offset {source.offset + length}")
                taken += count
        except OSError as error:
            self._discard(taken)
            if error.errno in (*_UNSUPPORTED, errno.EAGAIN):
                return False
            raise
        return True

    def empty(self, descriptor: int, length: int) -> None:
        """Send what is in the pipe, ``length`` bytes, to a socket. Raises OSError when it takes no more."""
        while length:
            length -= os.splice(self._read_end, descriptor, length)

    def close(self) -> None:
        """Close both ends."""
        os.close(self._read_end)
        os.close(self._write_end)

    def _discard(self, length: int) -> None:
        while length:
            length -= len(os.read(self._read_end, length))
