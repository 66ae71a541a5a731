"""What one client sends: received in large gulps into one buffer, and taken from there."""

from __future__ import annotations

import errno
import mmap
import socket

from nbdserve.backends.splicing import Pipe
from nbdserve.common.errors import ConnectionLostError
from nbdserve.transmission.byte_stream import Stream

CAPACITY = 512 << 10
"""The size of the buffer in bytes."""


class ReceiveBuffer:
    """A receive buffer. ``start`` and ``end`` bound what has been received and not been taken.

    ``early`` is what the client sent together with its last option; ``header`` is the size in bytes of a
    request without its payload. The transmission loop parses ``buffer`` (``view`` is the same bytes) and
    moves ``start`` itself. All methods raise ConnectionLostError when the client goes away, or falls silent
    for the socket's receive time-out, while it owes something.
    """

    def __init__(self, stream: Stream, early: bytes, header: int) -> None:
        self._stream = stream
        self._header = header
        self._gulp = CAPACITY
        # Only a plain socket gives pages as they are.
        self._socket = stream if isinstance(stream, socket.socket) else None
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
                count = self._stream.recv_into(self.view[self.end : self.end + self._gulp])
            except BlockingIOError as error:
                if self.end:
                    raise ConnectionLostError("the client sent half a request and fell silent") from error
                continue
            except OSError as error:
                raise ConnectionLostError(f"the client is gone: {error.strerror or error}") from error
            if not count and self.end:
                raise ConnectionLostError("the client went away in the middle of a request")
            self.end += count
            self._gulp = CAPACITY
            return count > 0

    @property
    def held(self) -> int:
        """Tell how many bytes have been received and not been taken."""
        return self.end - self.start

    @property
    def splices(self) -> bool:
        """Tell whether ``pass_on`` may be tried."""
        return self._socket is not None

    def take(self, length: int) -> memoryview:
        """Receive what is missing of the next ``length`` bytes, at most the capacity, and consume them.

        The view is valid until the next call of any method.
        """
        if self.start + length > CAPACITY:
            self._compact()
        while self.held < length:
            self.end += self._receive_payload(self.view[self.end : self.start + length])
        self.start += length
        return self.view[self.start - length : self.start]

    def fill(self, payload: memoryview) -> None:
        """Consume as many bytes as fill the payload, of any length."""
        held = min(self.held, len(payload))
        payload[:held] = self.take(held)
        while held < len(payload):
            held += self._receive_payload(payload[held:])

    def pass_on(self, pipe: Pipe, length: int) -> int:
        """Let a pipe take up to ``length`` bytes of a payload, of which none is held; return how many.

        It takes none where a socket of this kind cannot do that.
        """
        if self._socket is None:
            return 0
        # Another long write follows, likely: but for its header, its bytes shall stay where they are.
        self._gulp = self._header
        try:
            count = pipe.receive(self._socket.fileno(), length)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return 0
            raise _lost_in_payload(error) from error
        if not count:
            raise ConnectionLostError("the client went away in the middle of a payload")
        return count

    def give_back(self, rest: bytes) -> int:
        """Hold again what was passed on and not used, at most the capacity; nothing else must be held."""
        self.start, self.end = 0, len(rest)
        self.buffer[: self.end] = rest
        return len(rest)

    def _receive_payload(self, place: memoryview) -> int:
        """Receive bytes of a payload that are owed."""
        try:
            count = self._stream.recv_into(place, 0, socket.MSG_WAITALL)
        except OSError as error:
            raise _lost_in_payload(error) from error
        if not count:
            raise ConnectionLostError("the client went away in the middle of a payload")
        return count

    def _compact(self) -> None:
        """Move what is left to the front."""
        left = self.end - self.start
        if self.start:
            self.buffer[:left] = self.buffer[self.start : self.end]
            self.start, self.end = 0, left


def _lost_in_payload(error: OSError) -> ConnectionLostError:
    return ConnectionLostError(f"the client left a payload half sent: {error.strerror or error}")
