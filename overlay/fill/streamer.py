"""The background fill: what to fetch next, how much of it at once, and how fast.

One thread asks for pieces, as many at a time as the window says, and stores the answers. First what is zeros
in the backing is marked as that (see census); then come the surroundings of what guests missed, then the rest
in the order of the disk.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from nbdserve.client.reconnect import Fault, fault_of
from nbdserve.common.errors import ImageError, reason_of
from nbdserve.common.threads import Thread
from overlay.backing.connections import Session
from overlay.backing.failover import Sources
from overlay.backing.reads import LONGEST
from overlay.backing.zero_scan import fill_zeros
from overlay.fill.claims import Claim
from overlay.fill.fetch import Fetcher, Refusal
from overlay.fill.flow import Flow, Read, Share
from overlay.fill.job import Interrupted, Job, Phase
from overlay.fill.pacing import QUIET_STEP, RateLimit, Window
from overlay.fill.seeding import Seeding
from overlay.fill.verifying import Verifying
from overlay.formats.image import Image

_LOG = logging.getLogger("nbd-overlay")

_HINTS = 16
"""Places where guests missed something, that are remembered."""
_MOST_REFUSED = 64
"""Parts that no server can read, before it is given up."""
_QUIET = 0.005
"""Seconds after a guest had to wait in which it is expected to have to again, as it works on what it got."""
_HOLD = 0.05
"""Seconds that what has become absent is left alone: the guest may stand still at the source for that, and is
about to come here."""
_TICK = 0.2
"""Seconds in which a pause, a change of speed or an end is noticed at the latest."""


class Streamer:
    """Streams the backing into the image as long as its job runs.

    ``finished`` is called once the image needs its backing no more, before anybody else is told. ``is_due``
    tells whether it may come to that: once that is true nothing becomes absent any more.
    """

    def __init__(
        self,
        image: Image,
        sources: Sources,
        fetcher: Fetcher,
        job: Job,
        finished: Callable[[], None],
        is_due: Callable[[], bool] = lambda: True,
        seeding: Seeding | None = None,
    ) -> None:
        self.window = Window()
        self.limit = RateLimit()
        self.streamed = 0
        """Bytes that came over the network for it."""
        self.has_surveyed = False
        """Whether what is absent is known to be data: what is zeros in the backing has been marked."""
        self._rests = False
        self._image = image
        self._sources = sources
        self._fetcher = fetcher
        self._job = job
        self._finished = finished
        self._is_due = is_due
        self.seeding = seeding
        self.verifying = Verifying(image, sources)
        self._news = threading.Event()
        """Something has become absent, or the image may be finished."""
        self._hints: deque[int] = deque(maxlen=_HINTS)
        self._flow = Flow(fetcher.claims)
        self._refused = 0
        """Parts that no server can read, in this pass."""
        self._refusal: Refusal | None = None
        """The first of them."""
        self._losing_since: float | None = None
        """Since when connections are lost and nothing comes in between, by time.monotonic()."""
        self._thread = Thread(self._run, "streamer")
        fetcher.on_miss = self._hint

    @property
    def in_flight(self) -> int:
        """Return the bytes that were asked for and have not come yet."""
        return self._flow.bytes

    @property
    def is_ready(self) -> bool:
        """Tell whether everything is here, and only the guest is waited for."""
        return self._rests and self._image.complete and self._job.phase is Phase.RUNNING

    def start(self) -> None:
        """Be ready to stream whenever the job runs."""
        self._thread.start()

    def close(self) -> None:
        """Stop, after what is under way has been stored."""
        self._job.end()
        if self._thread.is_alive():
            self._thread.join()

    def look_again(self) -> None:
        """Something has become absent, or the image may be finished now."""
        self._news.set()

    def _hint(self, offset: int, length: int) -> None:
        """A guest has missed something here: it may want more around it."""
        if self._job.phase is Phase.RUNNING:
            self._hints.append(offset)

    def _run(self) -> None:
        while self._job.wait_until_running():
            try:
                self._stream()
            except Interrupted:
                self._store_the_rest()
            except Exception as error:  # noqa: BLE001 - whoever waits for the job is told, whatever it is
                self._store_the_rest()
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Let the job have failed, with the reason."""
        is_expected = isinstance(error, OSError | ImageError)
        reason = reason_of(error) if is_expected else f"it has failed inside: {error!r}"
        _LOG.error("streaming has stopped: %s", reason)
        self._job.fail(reason, error.errno if isinstance(error, OSError) else None)

    def _stream(self) -> None:
        """Go over the disk until nothing is absent; OSError when it cannot go on."""
        self.has_surveyed, self._losing_since, self._rests = False, None, False
        # An image that is complete needs nobody, also where it was not finished.
        if not self._image.complete:
            self._mark_zeros()
            if self.seeding is not None:
                self.seeding.run(self._session, self._job.pause_point)
        self.has_surveyed = True
        self._fetcher.copied.restart()
        while True:
            self._copy()
            # In this order: from then on nothing becomes absent any more.
            if self._is_due() and self._image.complete:
                break
            self._wait_for_news()
        if self.verifying.wanted:
            self.verifying.run(self._session, self._job.pause_point)
        self._image.finish()
        _LOG.info("everything is here: the backing is needed no more")
        self._finished()
        self._job.complete()
        self._sources.close()

    def _wait_for_news(self) -> None:
        """Everything is here, but what the guest changes elsewhere will have to be copied again."""
        self._rests = True
        if self._news.wait(_TICK) and not self._is_due():
            time.sleep(_HOLD)
        self._news.clear()
        self._job.pause_point()

    def _copy(self) -> None:
        """Fetch what is absent, until nothing is."""
        while not self._image.complete:
            before = self._image.local_bytes
            self._refused, self._refusal = 0, None
            for claims in self._next_claims():
                self._ask_for(claims)
                if self._refused > _MOST_REFUSED:
                    break
            self._finish_pass()
            if self._refusal is not None and not self._image.complete:
                # What can be copied has been.
                offset, error = self._refusal
                raise OSError(error.errno, f"the backing at {offset} cannot be read: {error.strerror}")
            if self._image.local_bytes == before and not self._image.complete:
                # What is missing is being fetched for a guest, or its connection was lost.
                self._job.pause_point(_TICK)

    def _mark_zeros(self) -> None:
        """Ask for the zeros of the whole disk; again from where it came to when the server is of no use."""
        come = 0

        def goes_on(offset: int) -> None:
            nonlocal come
            come = offset
            self._losing_since = None
            self._job.pause_point()

        while True:
            session = self._session()
            try:
                return fill_zeros(self._image, session, come, goes_on)
            except OSError as error:
                if fault_of(error) is Fault.REQUEST:
                    raise
                self._sources.blame(session, error)
                self._require_hope(error)

    def _next_claims(self) -> Iterator[list[Claim]]:
        """What to fetch next, until the end of the disk; claimed, so that nobody else fetches it."""
        for offset, length in self._image.absent(0, self._image.size):
            end = offset + length
            while offset < end:
                step = self._step()
                # A guest that wants what is claimed waits for it, but never for room.
                self._make_room()
                while self._hints:
                    hint = self._hints.popleft()
                    yield self._claim(hint - hint % step, step)
                    self._make_room()
                stop = min(offset // step * step + step, end)
                yield self._claim(offset, stop - offset)
                offset = stop

    def _claim(self, offset: int, length: int) -> list[Claim]:
        length = min(length, self._image.size - offset)
        claims, _ = self._fetcher.claim(offset, length, LONGEST)
        return claims

    def _step(self) -> int:
        """How much to fetch at a time: less on a slow link, beside a guest that waits, and with a limit."""
        step = QUIET_STEP if self._fetcher.fetched.lately(_QUIET) else LONGEST
        step = min(step, self._sources.length)
        unit = self._fetcher.claims.unit
        while self.limit.speed and step > unit and step > self.limit.speed // 20:
            step //= 2
        return max(step, unit)

    def _ask_for(self, claims: list[Claim]) -> None:
        """Ask for what is absent of claimed ranges."""
        shares = [Share(claim, 1) for claim in claims]
        try:
            for share in shares:
                for offset, length in list(self._image.absent(share.claim.offset, share.claim.length)):
                    self._flow.ask(self._session(), share, offset, length)
                    self.limit.passed(length)
        finally:
            for share in shares:
                self._flow.release(share)

    def _make_room(self) -> None:
        """Store answers until the window and the speed allow another request."""
        while True:
            self._job.pause_point()
            self._ask_again()
            delay = self.limit.delay()
            if self._flow.bytes < self._room() and delay <= 0:
                return
            if not self._flow.reads:
                self.window.idle()
            self._store_next(min(_TICK, delay) if delay > 0 else _TICK)

    def _room(self) -> int:
        """How many bytes may be in flight."""
        room = self.window.quiet_size if self._fetcher.fetched.lately(_QUIET) else self.window.size
        on_slow_link = self._sources.room
        return room if on_slow_link is None else min(room, on_slow_link)

    def _finish_pass(self) -> None:
        """Store everything that is under way, or find out that it cannot be had."""
        while self._flow.reads or self._flow.lost:
            self._job.pause_point()
            self._ask_again()
            self._store_next(_TICK)

    def _ask_again(self) -> None:
        """Ask for the rest of what lost connections have left in part."""
        while self._flow.lost:
            session = self._session()
            read = self._flow.lost.popleft()
            read.session = session
            try:
                self._flow.begin(read)
            except BaseException:
                self._flow.end(read)
                raise

    def _store_the_rest(self) -> None:
        """Store what is still under way, as far as the image takes it, and ask for nothing more.

        It ends, as no server may be silent for ever.
        """
        is_taken = True
        while self._flow.reads or self._flow.lost:
            while self._flow.lost:
                self._flow.end(self._flow.lost.popleft())
            answer = self._flow.next(_TICK)
            if answer is None:
                continue
            read, error = answer
            try:
                if error is None and is_taken:
                    self._store(read)
            except Exception as trouble:  # noqa: BLE001 - what has stopped the job is told, this is not
                _LOG.debug("what came after the end was not stored: %r", trouble)
                is_taken = False
            finally:
                self._flow.end(read)

    def _store_next(self, seconds: float) -> None:
        """Store one answer, if one comes in time. OSError when the image takes no more."""
        answer = self._flow.next(seconds)
        if answer is None:
            return
        read, error = answer
        if error is not None and fault_of(error) is Fault.CONNECTION:
            # What came is kept, and the rest asked for when a server is there again.
            self._flow.lost.append(read)
            self._sources.blame(read.session, error)
            if read.reading.bytes_missing < read.asked:
                self._losing_since = None
            self._require_hope(error)
            return
        try:
            if error is None:
                self._store(read)
            else:
                self._note(read, error)
        finally:
            self._flow.end(read)

    def _require_hope(self, error: OSError) -> None:
        """OSError when connections have been lost, and nothing came, for as long as patience lasts."""
        now = time.monotonic()
        since = self._losing_since = self._losing_since or now
        if now - since > self._sources.patience:
            raise OSError(errno.EIO, f"it is lost again and again, and nothing comes: {error.strerror}")

    def _store(self, read: Read) -> None:
        self._losing_since = None
        self.window.answered(len(read.data), time.monotonic() - read.sent)
        self._fetcher.store(read.offset, read.data, read.share.claim)
        self.streamed += len(read.data)

    def _note(self, read: Read, error: OSError) -> None:
        """A server could not do it: ask the others, and for less of it."""
        self._sources.blame(read.session, error)
        unit = self._fetcher.claims.unit
        for begin in range(0, len(read.data), unit):
            self._try_again(read.offset + begin, read.data[begin : begin + unit], read.share.claim)

    def _try_again(self, offset: int, data: memoryview, claim: Claim) -> None:
        """Ask every server for a small part of what one of them could not read, and then for less of it."""
        if self._refused > _MOST_REFUSED:
            return
        refusal = self._fetcher.salvage(offset, data, claim)
        if refusal is not None:
            self._refused += 1
            _LOG.warning("the backing at %d cannot be read: %s", refusal.offset, refusal.error.strerror)
            if self._refusal is None or refusal.offset < self._refusal.offset:
                self._refusal = refusal

    def _session(self) -> Session:
        """The backing; waits for it as long as it is worth it, with an eye on the job."""
        while not self._sources.connected:
            if self._sources.failed:
                raise OSError(errno.EIO, f"the backing is lost: {self._sources.troubles()}")
            self._sources.wait(_TICK)
            self._job.pause_point()
        return self._sources.session()
