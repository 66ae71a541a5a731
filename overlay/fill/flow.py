"""The reads that streaming has under way: asked for, answered, asked for again after a lost connection."""

from __future__ import annotations

import errno
import queue
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

from overlay.backing.connections import Session
from overlay.backing.reads import LONGEST, Reading
from overlay.fill.claims import Claim, Claims


@dataclass(slots=True)
class Share:
    """Reads that serve one claim, which is released with the last of them."""

    claim: Claim
    reads: int


@dataclass(slots=True)
class Read:
    """A read that is under way."""

    session: Session
    reading: Reading
    share: Share
    sent: float
    asked: int
    """How many bytes were asked for last: what has come before is kept."""

    @property
    def offset(self) -> int:
        """Tell where it begins on the disk."""
        return self.reading.offset

    @property
    def data(self) -> memoryview:
        """Tell where what is read goes, all of it once it has been answered."""
        return self.reading.buffer


class Flow:
    """What is under way, for the one thread that streams.

    Each read that is taken by :meth:`next` is either begun again, or ended.
    """

    def __init__(self, claims: Claims) -> None:
        self.bytes = 0
        """That were asked for and have not been answered."""
        self.reads = 0
        self.lost: deque[Read] = deque()
        """What a lost connection has left in part, to be asked for again or ended."""
        self._claims = claims
        self._answers: queue.SimpleQueue[tuple[Read, Future[None]]] = queue.SimpleQueue()
        self._longest = max(LONGEST, claims.unit)
        self._spare: list[bytearray] = []

    def ask(self, session: Session, share: Share, offset: int, length: int) -> None:
        """Ask for a part of a claim."""
        reading = Reading(offset, memoryview(self._buffer(length))[:length])
        self.begin(Read(session, reading, share, 0.0, length))
        share.reads += 1

    def begin(self, read: Read) -> None:
        """Ask for what is missing of a read."""
        read.sent, read.asked = time.monotonic(), read.reading.bytes_missing
        future = read.reading.start(read.session.bulk(), read.session.source.pace)
        self.bytes += len(read.data)
        self.reads += 1
        future.add_done_callback(lambda done: self._answers.put((read, done)))

    def next(self, seconds: float) -> tuple[Read, OSError | None] | None:
        """Return a read that was answered, and what went wrong; None if none is within so many seconds."""
        try:
            read, future = self._answers.get(timeout=seconds)
        except queue.Empty:
            return None
        self.bytes -= len(read.data)
        self.reads -= 1
        error = future.exception()
        if error is None or isinstance(error, OSError):
            return read, error
        return read, OSError(errno.EIO, repr(error))

    def end(self, read: Read) -> None:
        """A read is over, whatever came of it."""
        self.release(read.share)
        buffer = read.data.obj
        read.data.release()
        if isinstance(buffer, bytearray) and len(buffer) == self._longest:
            self._spare.append(buffer)

    def release(self, share: Share) -> None:
        """One that was to be read for a claim is over."""
        share.reads -= 1
        if not share.reads:
            self._claims.release(share.claim)

    def _buffer(self, length: int) -> bytearray:
        """Long buffers are used again: the kernel's zeroing of fresh memory costs as much as a copy."""
        if length <= LONGEST // 4:
            return bytearray(length)
        return self._spare.pop() if self._spare else bytearray(self._longest)
