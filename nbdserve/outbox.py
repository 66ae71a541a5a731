"""Replies on their way to one client: gathered in one buffer, sent with one system call."""

from __future__ import annotations

import socket
import threading

from nbdserve.errors import ConnectionLostError
from nbdserve.splicing import FileRange, Pipe
from nbdserve.stream import Stream

CAPACITY = 512 << 10
"""The size of the buffer in bytes. Larger ones fall out of the processor's cache and are slower."""


class Outbox:
    """A buffer of replies. The transmission loop builds the replies to reads in ``view`` itself.

    ``used`` bytes of ``view`` are filled; whoever fills more calls ``reserve`` first. Everything but ``send``
    belongs to one thread. Raises ConnectionLostError when the client is gone, or takes nothing for the
    socket's send time-out.
    """

    def __init__(self, stream: Stream, capacity: int = CAPACITY, lock: threading.Lock | None = None) -> None:
        self._stream = stream
        self._lock = lock or threading.Lock()
        self.capacity = capacity
        self.buffer = bytearray(capacity)
        self.view = memoryview(self.buffer)
        self.used = 0
        # Only a plain socket takes pages as they are, and only its own thread fills the pipe.
        self._socket = stream if isinstance(stream, socket.socket) and lock is None else None
        self._pipe: Pipe | None = None

    def beside(self, capacity: int) -> Outbox:
        """Another buffer for the same client, whose replies do not mix with this one's."""
        return Outbox(self._stream, capacity, self._lock)

    def reserve(self, length: int) -> int:
        """Make room for ``length`` bytes, at most the capacity, and return where they start."""
        if self.used + length > self.capacity:
            self.flush()
        return self.used

    def add(self, data: bytes | bytearray) -> None:
        """Append bytes of any length."""
        length = len(data)
        if length > self.capacity:
            self.flush()
            self.send(data)
            return
        start = self.reserve(length)
        self.buffer[start : start + length] = data
        self.used = start + length

    def flush(self) -> None:
        """Send everything."""
        if self.used:
            self.send(self.view[: self.used])
            self.used = 0

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send whole replies past the buffer. May be called from any thread."""
        with self._lock:
            try:
                self._stream.sendall(data)
            except OSError as error:
                raise ConnectionLostError(
                    f"the client takes no replies: {error.strerror or error}"
                ) from error

    def most_to_splice(self, source: FileRange) -> int:
        """How many bytes of a file ``splice`` can take with one reply; 0 where it cannot take any."""
        if self._socket is None:
            return 0
        if self._pipe is None:
            self._pipe = Pipe()
        return self._pipe.most(source.offset)

    def splice(self, head: bytearray, source: FileRange, length: int) -> bool:
        """Send the head of a reply and its data, which goes from the file to the socket without being copied.

        Raises OSError when the file cannot be read; nothing has been sent then. False, with nothing sent
        either, where the file system cannot do it; it is not tried again.
        """
        if self._socket is None or self._pipe is None:
            return False
        if not self._pipe.fill(source, length):
            self._socket = None
            return False
        self.flush()
        with self._lock:
            try:
                self._socket.sendall(head, socket.MSG_MORE)
                self._pipe.empty(self._socket.fileno(), length)
            except OSError as error:
                raise ConnectionLostError(
                    f"the client takes no replies: {error.strerror or error}"
                ) from error
        return True

    def close(self) -> None:
        """Let go of the pipe, if there is one."""
        if self._pipe is not None:
            self._pipe.close()
