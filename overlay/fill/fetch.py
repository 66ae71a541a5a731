"""Copy-on-read: what a guest misses is fetched, once for all who miss it, and kept.

The rule: claim, fetch without holding a lock, and let the image store only what is still absent then. So a
guest's write wins over a fetch that was under way. Nothing is stored of what was claimed before the image was
last invalidated: the guest may have changed it at the source since.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from nbdserve.common.errors import ImageError
from nbdserve.common.threads import Thread
from nbdserve.transmission.traffic import Histogram
from overlay.backing.failover import Sources
from overlay.fill.claims import UNIT, Claim, Claims
from overlay.fill.progress import Meter
from overlay.fill.read_ahead import ReadAhead
from overlay.formats.image import Image

_LOG = logging.getLogger("nbd-overlay")

_TOGETHER = 8
"""Requests that are under way at once for one read of a guest, and that may be read ahead of it."""
_WAITING_HINTS = 4
_MOST_BAD = 4
"""Units of what is read together in which single clusters are tried, when something cannot be read."""


@dataclass
class Fetched:
    """What was fetched so far because a guest, or read-ahead, asked for it."""

    misses: int = 0
    """Requests of guests that had to wait for a server."""
    waiting: int = 0
    """Requests of guests that wait now."""
    waited_until: float = -math.inf
    """When the last of them that is over ended, by time.monotonic()."""
    bytes: int = 0
    ahead: int = 0
    """Bytes of them that no guest had asked for yet."""
    waits: Histogram = field(default_factory=Histogram)
    """How long those requests of guests waited, in seconds."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def lately(self, seconds: float) -> bool:
        """Tell whether a guest waits, or did within the last ``seconds``."""
        return self.waiting > 0 or time.monotonic() - self.waited_until < seconds


class Refusal(NamedTuple):
    """The first place of a range that no server can read, and why."""

    offset: int
    error: OSError


class Fetcher:
    """Brings parts of the backing into the image.

    ``on_miss`` is called with the offset and length of what a guest had to wait for.

    Safe for several threads. What is claimed is fetched without a lock: who needs it too waits for the claim.
    ``_starting`` lets one thread start the one that reads ahead, or none once it is closed.
    """

    def __init__(self, image: Image, sources: Sources) -> None:
        self.claims = Claims(image.size, max(UNIT, image.cluster_size))
        self.fetched = Fetched()
        self.copied = Meter()
        """The bytes that became local by copying, whoever they were copied for."""
        self.on_miss: Callable[[int, int], None] | None = None
        self._image = image
        self._sources = sources
        self._ahead = ReadAhead(image.size)
        self._hints: queue.Queue[tuple[int, int] | None] = queue.Queue(_WAITING_HINTS)
        self._starting = threading.Lock()
        self._thread: Thread | None = None
        self._closed = False

    def bring(self, offset: int, length: int) -> None:
        """Make a range local for a guest that waits; OSError when no server can."""
        if self._image.is_local(offset, length):
            return
        with self.miss():
            claims, others = self.claim(offset, length)
            try:
                # Only now that we have claimed ours may others claim what is around.
                self._look_ahead(offset, length)
            except BaseException:
                self._release(claims)
                raise
            while claims or others:
                self._fetch(claims)
                _wait_for(others)
                claims, others = self.claim(offset, length)

    def bring_cluster(self, offset: int) -> None:
        """Make the one cluster local that has ``offset``, and fetch no more than that."""
        size = self._image.cluster_size
        start = offset - offset % size
        length = min(size, self._image.size - start)
        if self._image.is_local(start, length):
            return
        with self.miss():
            while not self._image.is_local(start, length):
                claims, others = self.claim(start, length)
                self._fetch(claims, (start, length))
                _wait_for(others)

    @contextlib.contextmanager
    def miss(self) -> Iterator[None]:
        """Within this a guest waits for a server."""
        began = time.monotonic()
        with self.fetched.lock:
            self.fetched.waiting += 1
        try:
            yield
        finally:
            with self.fetched.lock:
                self.fetched.waiting -= 1
                self.fetched.waited_until = time.monotonic()
                self.fetched.misses += 1
                self.fetched.waits.observe(time.monotonic() - began)

    def store(self, offset: int, data: memoryview, claim: Claim) -> int:
        """Keep what was fetched of a claim, as far as it is still absent; how many bytes became local."""
        # Taken before: the image may be invalidated, and the samples forgotten, as soon as it is stored.
        known_at = self._sources.samples.forgotten
        stored = self._image.fill(offset, data, claim.asked_at)
        self.copied.passed(stored)
        if stored:
            self._sources.samples.remember(offset, data, known_at)
        return stored

    def salvage(self, offset: int, data: memoryview, claim: Claim) -> Refusal | None:
        """Keep what can be read of a claimed range in which something could not: unit by unit, then clusters.

        ``data`` is for what is read, and the range whole clusters. Returns what cannot be read, if anything.
        OSError when no server is left.
        """
        refusals: list[Refusal] = []
        for place, part in _parts(offset, data, self.claims.unit):
            refusal = self._keep(place, part, claim)
            if refusal is not None and len(part) > self._image.cluster_size and len(refusals) < _MOST_BAD:
                tried = [self._keep(*each, claim) for each in _parts(place, part, self._image.cluster_size)]
                refusal = next((each for each in tried if each is not None), None)
            if refusal is not None:
                refusals.append(refusal)
        return refusals[0] if refusals else None

    def close(self) -> None:
        """Read ahead no more."""
        with self._starting:
            self._closed = True
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._hints.put_nowait(None)
            self._thread.join(1.0)

    def claim(self, offset: int, length: int, longest: int | None = None) -> tuple[list[Claim], list[Claim]]:
        """Claim what is absent of a range; see Claims.take.

        Unless ``longest`` says so, on a slow link in small parts, as others wait for all of a claim.
        """
        longest = longest or max(self.claims.unit, self._sources.length)
        asked_at = self._image.invalidations
        return self.claims.take(
            offset, length, lambda *part: not self._image.is_local(*part), longest, asked_at
        )

    def absent_part(self, claim: Claim) -> tuple[int, int]:
        """Narrow a claimed range: from the first to the last cluster that is absent; the length may be 0."""
        absent = list(self._image.absent(claim.offset, claim.length))
        if not absent:
            return claim.offset, 0
        begin = absent[0][0]
        return begin, sum(absent[-1]) - begin

    def _keep(self, offset: int, data: memoryview, claim: Claim) -> Refusal | None:
        """Ask every server for a range, and keep it."""
        try:
            self._sources.read((offset, data))
        except OSError as error:
            if not self._sources.connected:
                raise
            return Refusal(offset, error)
        self.store(offset, data, claim)
        return None

    def _fetch(self, claims: list[Claim], only: tuple[int, int] | None = None) -> None:
        """Fetch and store what is claimed, or only a part of it, and release the claims in any case."""
        held = deque(claims)
        try:
            while held:
                batch, size = [held[0]], held[0].length
                for claim in itertools.islice(held, 1, _TOGETHER):
                    size += claim.length
                    if size > _TOGETHER * self._sources.length:
                        break
                    batch.append(claim)
                self._fetch_parts([(claim, *(only or self.absent_part(claim))) for claim in batch])
                for _ in batch:
                    self.claims.release(held.popleft())
        finally:
            self._release(held)

    def _release(self, claims: Iterable[Claim]) -> None:
        for claim in claims:
            self.claims.release(claim)

    def _fetch_parts(self, batch: list[tuple[Claim, int, int]]) -> None:
        """Fetch and store a range of each claim."""
        parts = [(offset, memoryview(bytearray(length)), claim) for claim, offset, length in batch if length]
        if not parts:
            return
        try:
            self._sources.read(*((offset, data) for offset, data, _ in parts))
        except OSError:
            if not self._sources.connected:
                raise
            self._salvage(parts)
        else:
            for part in parts:
                self.store(*part)
        with self.fetched.lock:
            self.fetched.bytes += sum(len(data) for _, data, _ in parts)

    def _salvage(self, parts: list[tuple[int, memoryview, Claim]]) -> None:
        """Keep what can be read of them; OSError when that is not all."""
        refusals = [self.salvage(*part) for part in parts]
        for refusal in refusals:
            if refusal is not None:
                raise refusal.error

    def _look_ahead(self, offset: int, length: int) -> None:
        """A guest has missed something: tell whoever may want to know, and fetch what it will want next."""
        if self.on_miss is not None:
            self.on_miss(offset, length)
        ahead = self._ahead.after(offset, length)
        if ahead is None:
            return
        try:
            # On a slow link what is read ahead stands before what somebody waits for.
            self._hints.put_nowait((ahead[0], min(ahead[1], _TOGETHER * self._sources.length)))
        except queue.Full:
            return
        with self._starting:
            if self._thread is None and not self._closed:
                thread = Thread(self._run_ahead, "read-ahead")
                try:
                    thread.start()
                except OSError as error:
                    # The guest does not need it; the next miss tries again.
                    _LOG.debug("nothing is read ahead: %s", error.strerror)
                else:
                    self._thread = thread

    def _run_ahead(self) -> None:
        trouble = ""
        while (hint := self._hints.get()) is not None and not self._closed:
            before = time.monotonic()
            try:
                claims, _ = self.claim(*hint)
                self._fetch(claims)
            except (OSError, ImageError) as error:
                # Nobody waits for it; a guest that will is told by its own request.
                _LOG.debug("read-ahead: %s", error)
            except Exception as error:  # noqa: BLE001 - it goes on with the next, and says so once
                if repr(error) != trouble:
                    _LOG.error("reading ahead has failed: %r; it goes on with what is missed next", error)
                trouble = repr(error)
            else:
                with self.fetched.lock:
                    self.fetched.ahead += sum(claim.length for claim in claims)
                _LOG.debug("read ahead %d bytes at %d in %.3f s", hint[1], hint[0], time.monotonic() - before)


def _parts(offset: int, data: memoryview, size: int) -> Iterator[tuple[int, memoryview]]:
    """A range cut into pieces of a size, each with its offset."""
    for begin in range(0, len(data), size):
        yield offset + begin, data[begin : begin + size]


def _wait_for(others: list[Claim]) -> None:
    for other in others:
        other.wait()
