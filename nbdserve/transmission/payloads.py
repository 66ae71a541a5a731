"""What comes behind the header of a request: collected, skipped, or stored as it arrives."""

from __future__ import annotations

from nbdserve.backends.base import Backend
from nbdserve.backends.splicing import PAGE, Pipe, open_pipe
from nbdserve.transmission.commands import PIECE, WORTH_SPLICING
from nbdserve.transmission.receive_buffer import ReceiveBuffer
from nbdserve.transmission.reply_buffer import ReplyBuffer


class Payloads:
    """Takes the payloads of one client's requests out of its receive_buffer.

    Whatever is called consumes a whole payload, so that the next request is found. Raises ConnectionLostError
    when the client goes away, or falls silent, before the end of it. All belongs to the connection's thread.
    """

    def __init__(self, receive_buffer: ReceiveBuffer, reply_buffer: ReplyBuffer) -> None:
        self._receive_buffer = receive_buffer
        self._reply_buffer = reply_buffer
        self._pipe: Pipe | None = None
        self._splices = receive_buffer.splices

    def take(self, length: int) -> memoryview:
        """Return up to PIECE bytes; valid until the next call."""
        self._prepare(length)
        return self._receive_buffer.take(length)

    def collect(self, length: int) -> bytearray:
        """Return all of it."""
        self._prepare(length)
        payload = bytearray(length)
        self._receive_buffer.fill(memoryview(payload))
        return payload

    def skip(self, length: int) -> None:
        """Forget it."""
        while length:
            length -= len(self.take(min(length, PIECE)))

    def store(self, backend: Backend, offset: int, length: int) -> None:
        """Write it to the backend as it arrives, not durably. OSError when the backend fails."""
        left = length
        self._prepare(length)
        try:
            while left:
                pipe = self._pipe_for(left)
                target = backend.write_range(offset + length - left - pipe.held) if pipe else None
                if pipe is None or target is None:
                    piece = self._receive_buffer.take(self._next_piece(offset + length - left, left))
                    left -= len(piece)
                    backend.write(offset + length - left - len(piece), piece, fua=False)
                else:
                    count = self._receive_buffer.pass_on(pipe, min(left, PIECE))
                    left -= count
                    self._splices = count > 0 and pipe.store(target, last=not left)
                    if not self._splices:
                        left += self._receive_buffer.give_back(pipe.take_back())
        except OSError:
            if self._pipe is not None:
                self._pipe.take_back()
            self.skip(left)
            raise

    def _next_piece(self, position: int, left: int) -> int:
        """How many bytes to take through memory: what is there, up to the end of its last page, or many."""
        held = self._receive_buffer.held
        whole_pages = held + -(position + held) % PAGE
        return min(whole_pages if self._splices and held else PIECE, PIECE, left)

    def close(self) -> None:
        """Let go of the pipe, if there is one."""
        if self._pipe is not None:
            self._pipe.close()

    def _pipe_for(self, length: int) -> Pipe | None:
        """What the next bytes can go through to a file without being copied on the way; None for few."""
        if self._pipe is not None and self._pipe.held:
            return self._pipe
        if not self._splices or self._receive_buffer.held or length < WORTH_SPLICING:
            return None
        if self._pipe is None:
            self._pipe = open_pipe()
        return self._pipe

    def _prepare(self, length: int) -> None:
        if self._receive_buffer.held < length:
            # What was answered already shall not wait for a payload that takes its time.
            self._reply_buffer.flush()
