"""How much is asked for at once, and how fast: so that a link is full, and nobody else's queue is.

Whether guests wait is asked before each step by streamer.py (``_room`` and ``_step``, of ``lately`` in
fetch.py, which forgets a guest's miss after 5 ms): then the stream asks for QUIET_STEP at a time and keeps
no more in flight than ``quiet_size``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SMALLEST, LARGEST = 2 << 20, 24 << 20
"""Bytes in flight, at least and at most."""

QUIET_STEP = 256 << 10
"""Bytes to ask for at a time while guests wait."""
_QUIET_RATE = 256 << 20
"""Bytes a second that a link is still used for while guests wait."""
_ROUNDS = 10
"""Rounds for which the best rate seen counts."""
_FORGET = 10.0
"""Seconds for which the shortest latency seen counts."""
_HEADROOM = 2.0
"""How often what a link holds is in flight: once on the link, and once in the queues at its ends."""


class Window:
    """How many bytes may be in flight: about twice what the link holds, which is its rate times its latency.

    It grows as long as that makes the rate grow, and shrinks when requests only wait longer for each other.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.size = SMALLEST
        self.rate = 0.0
        """Bytes a second lately."""
        self.latency = 0.0
        """Seconds that a request takes when nothing stands before it, as far as was seen."""
        self._clock = clock
        self._rates: list[float] = []
        self._latency_seen = clock()
        self._began = clock()
        self._bytes = 0

    @property
    def quiet_size(self) -> int:
        """Tell how many bytes may be in flight while guests wait: few, but more where the link is long.

        Near by it is the processors that everybody waits for, and a long link that is empty helps nobody.
        """
        return min(self.size, max(QUIET_STEP, int(_QUIET_RATE * self.latency)))

    def answered(self, length: int, seconds: float) -> None:
        """A request of so many bytes was answered after so many seconds."""
        now = self._clock()
        if now - self._latency_seen > _FORGET:
            # Our own requests stand before one another now: with few of them the link shows what it can do.
            self.latency, self._latency_seen, self.size = seconds, now, SMALLEST
            self._began, self._bytes = now, 0
        elif not self.latency or seconds < self.latency:
            self.latency, self._latency_seen = seconds, now
        self._bytes += length
        elapsed = now - self._began
        # A round is long enough that what was asked for in it has been answered.
        if elapsed >= max(self.latency, 0.01) and self._bytes >= self.size:
            self._end_round(now, self._bytes / elapsed)

    def idle(self) -> None:
        """Nothing was asked for in a while: that says nothing of the link."""
        self._began, self._bytes = self._clock(), 0

    def _end_round(self, now: float, rate: float) -> None:
        best = max(self._rates, default=0.0)
        self._rates = [*self._rates[1 - _ROUNDS :], rate]
        self.rate = rate
        self._began, self._bytes = now, 0
        held = max(self._rates) * self.latency
        wanted = 2 * self.size if rate > 1.1 * best else _HEADROOM * held
        self.size = int(min(max(wanted, SMALLEST), LARGEST))


class RateLimit:
    """Lets so many bytes a second pass; 0 means no limit. A burst is a twentieth of a second's worth."""

    def __init__(self, speed: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._speed = speed
        self._due = clock()

    @property
    def speed(self) -> int:
        """Return bytes a second; 0 means no limit."""
        return self._speed

    @speed.setter
    def speed(self, speed: int) -> None:
        self._speed, self._due = speed, self._clock()

    def delay(self) -> float:
        """Return the seconds until the next bytes may pass; 0 or less if they may now."""
        return self._due - self._clock() if self._speed else 0.0

    def passed(self, length: int) -> None:
        """So many bytes are on their way."""
        if self._speed:
            self._due = max(self._due, self._clock() - 0.05) + length / self._speed
