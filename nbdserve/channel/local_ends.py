"""The local end of a stream: a socket, or two pipes as QEMU gives them to what it executes.

Nothing here waits. What cannot be delivered yet is kept; the stream's window bounds it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
from collections import deque
from collections.abc import Callable

from nbdserve.channel.wire.frames import MOST_DATA
from nbdserve.channel.wire.streams import Stream

_PIECES = 64
"""Pieces that are written with one system call, at most."""
_BUFFER = 1 << 20
"""Bytes that may be on their way through a socket or a pipe; the kernel gives less to the unprivileged."""

Observe = Callable[[memoryview], None]
"""Is shown what passes; nothing, at the end of what is read."""


class LocalEnd:
    """The descriptors of a stream's local end, which are its own from now on. For one thread.

    They do not block. ``reader`` and ``writer`` are one socket or two pipes. ``on_read`` is shown what is
    read, and ``on_delivery`` what is delivered, beforehand. ``on_hang_up`` is called when nobody writes any
    more, whether or not what is still to be read can be sent. ``ahead`` was read of it already.
    """

    def __init__(
        self,
        stream: Stream,
        reader: int,
        writer: int,
        on_read: Observe | None = None,
        on_delivery: Observe | None = None,
        on_hang_up: Callable[[], None] = lambda: None,
        ahead: bytes = b"",
    ) -> None:
        self.stream = stream
        self.reader = reader
        self.writer = writer
        self.held = 0
        """Bytes that have come and are not delivered yet."""
        self.closed = False
        self.is_kept_waiting = False
        """Nothing is delivered as long as this is so: what comes is kept."""
        self._ahead = memoryview(ahead)
        self._waiting = deque[bytearray]()
        # Bytes of the first of these that are delivered.
        self._gone = 0
        self.on_hang_up = on_hang_up
        self._on_read = on_read
        self._on_delivery = on_delivery
        self._sock = socket.socket(fileno=reader) if reader == writer else None
        self._is_last = False
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        if self._sock is not None:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)

    def read_into(self, buffers: list[memoryview]) -> int | None:
        """Read what is to be sent: how many bytes, 0 at the end, None if there is nothing. Raises OSError."""
        if self._ahead:
            count = min(len(buffers[0]), len(self._ahead))
            buffers[0][:count], self._ahead = self._ahead[:count], self._ahead[count:]
            return count
        try:
            count = os.readv(self.reader, buffers)
        except BlockingIOError:
            return None
        if self._on_read is not None:
            self._show(buffers, count)
        return count

    def _show(self, buffers: list[memoryview], count: int) -> None:
        """Show what was read into buffers, or its end."""
        assert self._on_read is not None
        if not count:
            self._on_read(buffers[0][:0])
        for buffer in buffers:
            if count > 0:
                self._on_read(buffer[:count])
            count -= len(buffer)

    def deliver(self, pieces: list[memoryview]) -> int:
        """Deliver what has come, now or when that is possible; how many bytes were now. Raises OSError."""
        if self._on_delivery is not None:
            for piece in pieces:
                self._on_delivery(piece)
        count = 0
        if not (self._waiting or self.is_kept_waiting):
            with contextlib.suppress(BlockingIOError):
                count = os.writev(self.writer, pieces)
        left = count
        for piece in pieces:
            if left < len(piece):
                self._keep(piece[max(left, 0) :])
            left -= len(piece)
        return count

    def flush(self) -> int:
        """Deliver what waits, as far as possible; how many bytes that were. Raises OSError."""
        total = 0
        while self._waiting and not self.is_kept_waiting:
            pieces = [memoryview(each) for each in itertools.islice(self._waiting, _PIECES)]
            pieces[0] = pieces[0][self._gone :]
            try:
                count = os.writev(self.writer, pieces)
            except BlockingIOError:
                break
            total += count
            self._forget(count)
        if self._is_last and not self._waiting:
            self._end()
        return total

    def end(self) -> None:
        """Nothing more comes: say so behind what waits. Raises OSError."""
        self._is_last = True
        if not self._waiting:
            self._end()

    def close(self) -> None:
        """Give everything back, and forget what waits."""
        if self.closed:
            return
        self.closed = True
        self._waiting.clear()
        self._gone = 0
        self.held = 0
        if self._sock is not None:
            self._sock.close()
        else:
            os.close(self.reader)
            if self.writer >= 0:
                os.close(self.writer)

    def _keep(self, rest: memoryview) -> None:
        """Keep what cannot be delivered yet; short pieces together, as each costs memory of its own."""
        self.held += len(rest)
        if self._waiting and len(self._waiting[-1]) + len(rest) <= MOST_DATA:
            self._waiting[-1].extend(rest)
        else:
            self._waiting.append(bytearray(rest))

    def _forget(self, count: int) -> None:
        """So many bytes of what waits are delivered."""
        self.held -= count
        self._gone += count
        while self._waiting and self._gone >= len(self._waiting[0]):
            self._gone -= len(self._waiting.popleft())

    def _end(self) -> None:
        self._is_last = False
        if self._sock is not None:
            self._sock.shutdown(socket.SHUT_WR)
        else:
            os.close(self.writer)
            self.writer = -1


def from_socket(stream: Stream, sock: socket.socket, on_read: Observe | None = None) -> LocalEnd:
    """Return an end that is a connected socket, which is its own from now on; OSError if that is closed."""
    fd = sock.detach()
    if fd < 0:
        raise OSError(errno.EBADF, "who wanted the stream has given it up")
    return LocalEnd(stream, fd, fd, on_read)
