"""Replies on their way to one client: gathered in one buffer, sent with one system call."""

from __future__ import annotations

import socket

from nbdserve.errors import ConnectionLostError
from nbdserve.protocol.constants import NbdError
from nbdserve.protocol.messages import error_reply, simple_reply
from nbdserve.protocol.offers import Agreement

CAPACITY = 512 << 10
"""The size of the buffer in bytes. Larger ones fall out of the processor's cache and are slower."""


class Outbox:
    """A buffer of replies. The transmission loop builds the replies to reads in ``view`` itself.

    ``used`` bytes of ``view`` are filled; whoever fills more calls ``reserve`` first. Raises
    ConnectionLostError when the client is gone, or takes nothing for the socket's send time-out.
    """

    def __init__(self, sock: socket.socket, agreement: Agreement) -> None:
        self._sock = sock
        self._agreement = agreement
        self.buffer = bytearray(CAPACITY)
        self.view = memoryview(self.buffer)
        self.used = 0

    def reserve(self, length: int) -> int:
        """Make room for ``length`` bytes, at most the capacity, and return where they start."""
        if self.used + length > CAPACITY:
            self.flush()
        return self.used

    def add(self, data: bytes | memoryview) -> None:
        """Append bytes of any length."""
        length = len(data)
        if length > CAPACITY:
            self.flush()
            self._send(data)
            return
        start = self.reserve(length)
        self.buffer[start : start + length] = data
        self.used = start + length

    def done(self, cookie: int) -> None:
        """Append the reply to a request that succeeded and returns no data."""
        self.add(simple_reply(cookie))

    def error(self, cookie: int, error: NbdError, message: str) -> None:
        """Append the reply to a request that failed."""
        self.add(error_reply(self._agreement, cookie, error, message))

    def flush(self) -> None:
        """Send everything."""
        if self.used:
            self._send(self.view[: self.used])
            self.used = 0

    def _send(self, data: bytes | memoryview) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise ConnectionLostError(f"the client takes no replies: {error.strerror or error}") from error
