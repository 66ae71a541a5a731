"""What one client sends: received in large gulps into one buffer, and taken from there."""

from __future__ import annotations

import mmap
import socket

from nbdserve.errors import ConnectionLostError
from nbdserve.stream import Stream

CAPACITY = 512 << 10
"""The size of the buffer in bytes."""


class Inbox:
    """A receive buffer. ``start`` and ``end`` bound what has been received and not been taken.

    ``early`` is what the client sent together with its last option. The transmission loop parses ``buffer``
    (``view`` is the same bytes) and moves ``start`` itself. All methods raise ConnectionLostError when the
    client goes away, or falls silent for the socket's receive time-out, while it owes something.
    """

    def __init__(self, stream: Stream, early: bytes) -> None:
        self._stream = stream
        # Memory that costs nothing until it is used: of many clients most are idle.
        self.buffer = mmap.mmap(-1, max(CAPACITY, len(early)))
        self.buffer[: len(early)] = early
        self.view = memoryview(self.buffer)
        self.start = 0
        self.end = len(early)

    def receive(self) -> bool:
        """Wait for more, for ever if the client owes nothing; False at the end of the stream."""
        self._compact()
        while True:
            try:
                count = self._stream.recv_into(self.view[self.end :])
            except BlockingIOError as error:
                if self.end:
                    raise ConnectionLostError("the client sent half a request and fell silent") from error
                continue
            except OSError as error:
                raise ConnectionLostError(f"the client is gone: {error.strerror or error}") from error
            if not count and self.end:
                raise ConnectionLostError("the client went away in the middle of a request")
            self.end += count
            return count > 0

    def holds(self, length: int) -> bool:
        """Whether so many bytes have been received."""
        return self.end - self.start >= length

    def take(self, length: int) -> memoryview:
        """Receive what is missing of the next ``length`` bytes, at most the capacity, and consume them.

        The view is valid until the next call of any method.
        """
        if self.start + length > CAPACITY:
            self._compact()
        while not self.holds(length):
            stop = self.start + length
            try:
                count = self._stream.recv_into(self.view[self.end : stop], 0, socket.MSG_WAITALL)
            except OSError as error:
                reason = error.strerror or error
                raise ConnectionLostError(f"the client left a payload half sent: {reason}") from error
            if not count:
                raise ConnectionLostError("the client went away in the middle of a payload")
            self.end += count
        self.start += length
        return self.view[self.start - length : self.start]

    def _compact(self) -> None:
        """Move what is left to the front."""
        left = self.end - self.start
        if self.start:
            self.buffer[:left] = self.buffer[self.start : self.end]
            self.start, self.end = 0, left
