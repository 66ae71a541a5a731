"""The background fill: what to fetch next, how much of it at once, and how fast.

One thread asks for pieces, as many at a time as the window says, and stores the answers. First what is zeros
in the backing is marked as that (see census); then come the surroundings of what guests missed, then the rest
in the order of the disk.
"""

from __future__ import annotations

import errno
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from nbdserve.errors import ImageError
from nbdserve.threads import Thread
from overlay.census import fill_zeros
from overlay.claims import Claim
from overlay.fetch import LONGEST, Fetcher, Refusal
from overlay.image import Image, State
from overlay.job import Interrupted, Job, Phase
from overlay.pacing import QUIET_STEP, RateLimit, Window
from overlay.reads import start_read
from overlay.source import GONE, Session
from overlay.sources import Sources

_LOG = logging.getLogger("nbd-overlay")

_HINTS = 16
"""Places where guests missed something, that are remembered."""
_MOST_REFUSED = 64
"""Parts that no server can read, before it is given up."""
_QUIET = 0.02
"""Seconds after a guest had to wait in which it is expected to have to again."""
_TICK = 0.2
"""Seconds in which a pause, a change of speed or an end is noticed at the latest."""


@dataclass(slots=True)
class _Read:
    """A request that is under way. ``share`` is of the claim that it serves, released with its last read."""

    session: Session
    offset: int
    data: memoryview
    sent: float
    share: _Share


@dataclass(slots=True)
class _Share:
    claim: Claim
    reads: int


class Streamer:
    """Streams the backing into the image as long as its job runs.

    ``finished`` is called once the image needs its backing no more, before anybody else is told.
    """

    def __init__(
        self, image: Image, sources: Sources, fetcher: Fetcher, job: Job, finished: Callable[[], None]
    ) -> None:
        self.window = Window()
        self.limit = RateLimit()
        self.streamed = 0
        """Bytes that came over the network for it."""
        self.has_surveyed = False
        """Whether what is absent is known to be data: what is zeros in the backing has been marked."""
        self._image = image
        self._sources = sources
        self._fetcher = fetcher
        self._job = job
        self._finished = finished
        self._hints: deque[int] = deque(maxlen=_HINTS)
        self._answers: queue.SimpleQueue[tuple[_Read, Future[None]]] = queue.SimpleQueue()
        self.in_flight = 0
        """Bytes that were asked for and have not come yet."""
        self._reads = 0
        self._spare: list[bytearray] = []
        self._refused = 0
        """Parts that no server can read, in this pass."""
        self._refusal: Refusal | None = None
        """The first of them."""
        self._thread = Thread(self._run, "streamer")
        fetcher.on_miss = self._hint

    def start(self) -> None:
        """Be ready to stream whenever the job runs."""
        self._thread.start()

    def close(self) -> None:
        """Stop, after what is under way has been stored."""
        self._job.end()
        if self._thread.is_alive():
            self._thread.join()

    def _hint(self, offset: int, length: int) -> None:
        """A guest has missed something here: it may want more around it."""
        if self._job.phase is Phase.RUNNING:
            self._hints.append(offset // LONGEST * LONGEST)

    def _run(self) -> None:
        while self._job.wait_until_running():
            try:
                try:
                    self._stream()
                finally:
                    self._drain()
            except Interrupted:
                self._abandon()
            except (OSError, ImageError) as error:
                self._abandon()
                reason = (isinstance(error, OSError) and error.strerror) or str(error)
                _LOG.error("streaming has stopped: %s", reason)
                self._job.fail(reason, error.errno if isinstance(error, OSError) else None)

    def _stream(self) -> None:
        """Go over the disk until nothing is absent; OSError when it cannot go on."""
        self.has_surveyed = False
        self._mark_zeros()
        self.has_surveyed = True
        self._fetcher.copied.restart()
        while not self._image.complete:
            before = self._image.local_bytes
            self._refused, self._refusal = 0, None
            for claims in self._next_claims():
                self._ask_for(claims)
                if self._refused > _MOST_REFUSED:
                    break
            self._drain()
            if self._refusal is not None and not self._image.complete:
                # What can be copied has been.
                offset, error = self._refusal
                raise OSError(error.errno, f"the backing at {offset} cannot be read: {error.strerror}")
            if self._image.local_bytes == before and not self._image.complete:
                # What is missing is being fetched for a guest, or its connection was lost.
                self._job.pause_point(_TICK)
        self._image.finish()
        _LOG.info("everything is here: the backing is needed no more")
        self._finished()
        self._job.complete()
        self._sources.close()

    def _mark_zeros(self) -> None:
        """Ask for the zeros of the whole disk; again from where it came to when the connection is lost."""
        come = 0

        def goes_on(offset: int) -> None:
            nonlocal come
            come = offset
            self._job.pause_point()

        while True:
            session = self._session()
            try:
                return fill_zeros(self._image, session, come, goes_on)
            except OSError as error:
                if error.errno not in GONE:
                    raise
                self._sources.blame(session, error)

    def _next_claims(self) -> Iterator[list[Claim]]:
        """What to fetch next, until the end of the disk; claimed, so that nobody else fetches it."""
        for run in self._image.runs(0, self._image.size):
            if run.state is not State.ABSENT:
                continue
            offset, end = run.offset, run.offset + run.length
            while offset < end:
                step = self._step()
                # A guest that wants what is claimed waits for it, but never for room.
                self._make_room()
                while self._hints:
                    yield self._claim(self._hints.popleft(), LONGEST)
                    self._make_room()
                stop = min(offset // step * step + step, end)
                yield self._claim(offset, stop - offset)
                offset = stop

    def _claim(self, offset: int, length: int) -> list[Claim]:
        length = min(length, self._image.size - offset)
        claims, _ = self._fetcher.claims.take(
            offset, length, lambda *part: not self._image.is_local(*part), LONGEST
        )
        return claims

    def _step(self) -> int:
        """How much to fetch at a time: less beside a guest that waits, and when the speed is limited."""
        step = QUIET_STEP if self._fetcher.fetched.lately(_QUIET) else LONGEST
        unit = self._fetcher.claims.unit
        while self.limit.speed and step > unit and step > self.limit.speed // 20:
            step //= 2
        return max(step, unit)

    def _ask_for(self, claims: list[Claim]) -> None:
        """Ask for what is absent of claimed ranges."""
        shares = [_Share(claim, 1) for claim in claims]
        try:
            for share in shares:
                for run in list(self._image.runs(share.claim.offset, share.claim.length)):
                    if run.state is State.ABSENT:
                        self._send(share, run.offset, run.length)
        finally:
            for share in shares:
                self._release(share)

    def _send(self, share: _Share, offset: int, length: int) -> None:
        session = self._session()
        data = memoryview(self._buffer(length))[:length]
        read = _Read(session, offset, data, time.monotonic(), share)
        try:
            future = start_read(session.bulk(), offset, data)
        except OSError as error:
            self._sources.blame(session, error)
            return
        self.limit.passed(length)
        share.reads += 1
        self.in_flight += length
        self._reads += 1
        future.add_done_callback(lambda done: self._answers.put((read, done)))

    def _make_room(self) -> None:
        """Store answers until the window and the speed allow another request."""
        while True:
            self._job.pause_point()
            delay = self.limit.delay()
            if self.in_flight < self._room() and delay <= 0:
                return
            if not self._reads:
                self.window.idle()
            self._store_next(min(_TICK, delay) if delay > 0 else _TICK)

    def _room(self) -> int:
        """How many bytes may be in flight."""
        return self.window.quiet_size if self._fetcher.fetched.lately(_QUIET) else self.window.size

    def _drain(self) -> None:
        """Store, or give up, everything that is under way. It ends, as every request has a time limit."""
        while self._reads:
            self._store_next(_TICK)

    def _abandon(self) -> None:
        """Take what is still under way without storing it: the image takes no more, or nobody wants it."""
        while self._reads:
            self._store_next(_TICK, self._forget)

    def _forget(self, read: _Read) -> None:
        pass

    def _store_next(self, seconds: float, store: Callable[[_Read], None] | None = None) -> None:
        """Store one answer, if one comes in time. OSError when the image takes no more."""
        try:
            read, future = self._answers.get(timeout=seconds)
        except queue.Empty:
            return
        self.in_flight -= len(read.data)
        self._reads -= 1
        try:
            error = future.exception()
            if isinstance(error, OSError):
                self._note(read, error)
            else:
                future.result()
                (store or self._store)(read)
        finally:
            self._release(read.share)
            self._recycle(read.data)

    def _store(self, read: _Read) -> None:
        self.window.answered(len(read.data), time.monotonic() - read.sent)
        self._fetcher.store(read.offset, read.data)
        self.streamed += len(read.data)

    def _note(self, read: _Read, error: OSError) -> None:
        """A request failed. What a lost connection leaves absent is asked for again in the next pass."""
        self._sources.blame(read.session, error)
        if error.errno not in GONE:
            unit = self._fetcher.claims.unit
            for begin in range(0, len(read.data), unit):
                self._try_again(read.offset + begin, read.data[begin : begin + unit])

    def _try_again(self, offset: int, data: memoryview) -> None:
        """Ask every server for a small part of what one of them could not read, and then for less of it."""
        if self._refused > _MOST_REFUSED:
            return
        refusal = self._fetcher.salvage(offset, data)
        if refusal is not None:
            self._refused += 1
            _LOG.warning("the backing at %d cannot be read: %s", refusal.offset, refusal.error.strerror)
            if self._refusal is None or refusal.offset < self._refusal.offset:
                self._refusal = refusal

    def _release(self, share: _Share) -> None:
        share.reads -= 1
        if not share.reads:
            self._fetcher.claims.release(share.claim)

    def _session(self) -> Session:
        """The backing; waits for it as long as it is worth it, with an eye on the job."""
        while not self._sources.connected:
            if self._sources.failed:
                raise OSError(errno.EIO, f"the backing is lost: {self._sources.troubles()}")
            self._sources.wait(_TICK)
            self._job.pause_point()
        return self._sources.session()

    def _buffer(self, length: int) -> bytearray:
        """Long buffers are used again: the kernel's zeroing of fresh memory costs as much as a copy."""
        if length <= LONGEST // 4:
            return bytearray(length)
        return self._spare.pop() if self._spare else bytearray(LONGEST)

    def _recycle(self, data: memoryview) -> None:
        buffer = data.obj
        data.release()
        if isinstance(buffer, bytearray) and len(buffer) == LONGEST:
            self._spare.append(buffer)
