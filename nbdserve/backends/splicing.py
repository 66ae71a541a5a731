"""Long reads and writes without copying: pages go between file and socket through a pipe, as references.

A read copies nothing in this way. A write is copied once, by the kernel, from where the network has put it
into the page cache, instead of twice.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
from typing import NamedTuple

CAPACITY = 1 << 20
"""Bytes that the pipe should hold: what an unprivileged process may ask for (/proc/sys/fs/pipe-max-size)."""

PAGE = 4096
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class FileRange(NamedTuple):
    """Where bytes lie in an open file of this machine."""

    descriptor: int
    offset: int


def open_pipe() -> Pipe | None:
    """Return a pipe; None when the process may open no more files, as there are other ways."""
    try:
        return Pipe()
    except OSError:
        return None


class Pipe:
    """A pipe that is filled from a file and then emptied into a socket, or the other way, by splice(2).

    For a read it is filled first, so that an error of the disk is known before the reply's header is sent.
    What is sent are references to pages: a write that comes while the reply is on its way may be seen in it,
    as a read and a write that are under way at the same time may be served in either order.
    """

    def __init__(self) -> None:
        self._read_end, self._write_end = os.pipe2(os.O_CLOEXEC)
        self.held = 0
        """Bytes received and not stored."""
        self._room = select.poll()
        self._room.register(self._write_end, select.POLLOUT)
        try:
            self.capacity = fcntl.fcntl(self._write_end, fcntl.F_SETPIPE_SZ, CAPACITY)
        except OSError:
            # A user has a quota of pipe buffers; a pipe as it comes does too, if more slowly.
            self.capacity = fcntl.fcntl(self._write_end, fcntl.F_GETPIPE_SZ)

    def most(self, offset: int) -> int:
        """Tell how many bytes fit from a file offset on; a part of a page takes a whole place."""
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
            self._empty(taken)
            if error.errno in (*_UNSUPPORTED, errno.EAGAIN):
                return False
            raise
        return True

    def empty(self, descriptor: int, length: int) -> None:
        """Send what is in the pipe, ``length`` bytes, to a socket. Raises OSError when it takes no more."""
        while length:
            length -= os.splice(self._read_end, descriptor, length)

    def receive(self, descriptor: int, length: int) -> int:
        """Take up to ``length`` bytes from a socket, waiting for at least one; 0 at the end of the stream.

        Raises OSError when there are none to be had, EINVAL when the socket cannot do that.
        """
        count = os.splice(descriptor, self._write_end, length)
        self.held += count
        return count

    def store(self, target: FileRange, *, last: bool) -> bool:
        """Write what is in the pipe to a file; False, with all of it still here, if its file system cannot.

        Unless it is the ``last``, half a page stays here until its other half has come: to write it could
        mean to read it from the disk before. Raises OSError when it cannot be written.
        """
        end = target.offset + self.held
        border = end if last else end - end % PAGE
        try:
            while end - self.held < border:
                self.held -= self._write(target.descriptor, end - self.held, border)
            # To wait for more in a full pipe would be to wait for ever: it may be full of single bytes.
            while self.held and self._is_full():
                self.held -= self._write(target.descriptor, end - self.held, end)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return False
        return True

    def take_back(self) -> bytes:
        """Return everything that is in the pipe."""
        content, self.held = self._empty(self.held), 0
        return content

    def _write(self, descriptor: int, position: int, end: int) -> int:
        return os.splice(self._read_end, descriptor, end - position, offset_dst=position)

    def _is_full(self) -> bool:
        return not self._room.poll(0)

    def close(self) -> None:
        """Close both ends."""
        os.close(self._read_end)
        os.close(self._write_end)

    def _empty(self, length: int) -> bytes:
        """Return what is in the pipe."""
        content = bytearray()
        while len(content) < length:
            content += os.read(self._read_end, length - len(content))
        return bytes(content)
