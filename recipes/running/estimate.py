"""How long the rest of a stream takes: an estimate that neither jumps nor goes by what a stall was like."""

from __future__ import annotations

from collections import deque

WARM_UP = 2.0
"""Seconds of movement in which a rate says nothing yet."""

STALL = 5.0
"""Seconds without a byte from which on nothing is said of the time left."""

LONG, SHORT = 120.0, 10.0
"""Seconds over which the rate is averaged, and over which it shows that the link has changed."""

CHANGED = 0.3
"""The part by which the two differ then."""

SETTLE = 3.0
"""Seconds in which the time left comes near to what it is at a new rate."""

JUMP = 0.15
"""The part by which the time left changes from one look to the next, at most, beyond a second."""


class Estimate:
    """Of one stream, which is told how far it is about twice a second.

    Pure: the time is the caller's. A stall counts neither as time that the stream needs nor for its rate:
    what comes after it is expected to go as what came before it.
    """

    def __init__(self) -> None:
        self._told: float | None = None
        """When it was told last."""
        self._clock = self._moved_at = 0.0
        """Seconds in which something moved, until now and until the last byte."""
        self._samples: deque[tuple[float, int]] = deque()
        self._left: float | None = None
        self._left_then: float | None = None
        """What was left when something moved last."""

    def note(self, now: float, moved: int, missing: int) -> None:
        """Note how many bytes have moved since some beginning, and how many are to come.

        ``now`` are seconds, ``moved`` never decreases; what needed not be moved, as it is zeros, counts only
        as not missing.
        """
        step = max(0.0, now - self._told) if self._told is not None else 0.0
        self._told = now
        self._clock += step
        if not self._samples or moved > self._samples[-1][1]:
            if self.stalled:
                self._clock, self._left = self._moved_at + step, self._left_then
            self._samples.append((self._clock, moved))
            self._moved_at, self._left_then = self._clock, self._left
        self._forget()
        self._estimate(step, missing)

    def restart(self) -> None:
        """What moves from now on is counted from another beginning, or goes at another speed."""
        self._samples.clear()

    @property
    def stalled(self) -> bool:
        """Tell whether nothing moves."""
        return self._clock - self._moved_at >= STALL

    @property
    def rate(self) -> float:
        """Return bytes per second of late; 0 while that is not known, or nothing moves."""
        return 0.0 if self.stalled else self._average()

    @property
    def left(self) -> float | None:
        """Return seconds until all is there; None while that is not known, or nothing moves."""
        return None if self.stalled else self._left

    def _average(self, seconds: float = LONG) -> float:
        """Return the rate in so many seconds before the last byte, and since."""
        older = [sample for sample in self._samples if sample[0] <= self._clock - seconds]
        if not self._samples:
            return 0.0
        (begin, first), (_, last) = older[-1] if older else self._samples[0], self._samples[-1]
        passed = self._clock - begin
        return (last - first) / passed if passed >= WARM_UP else 0.0

    def _forget(self) -> None:
        """Keep what the rate is made of, and the last that is older: of a link that has changed, little."""
        average, lately = self._average(), self._average(SHORT)
        kept = SHORT if abs(lately - average) > CHANGED * average else LONG
        while len(self._samples) > 2 and self._samples[1][0] <= self._clock - kept:
            self._samples.popleft()

    def _estimate(self, step: float, missing: int) -> None:
        if missing <= 0:
            self._left = 0.0
            return
        if self.stalled or not (rate := self._average()):
            return
        target = missing / rate
        if self._left is None:
            self._left = target
            return
        expected = max(0.0, self._left - step)
        most = 1.0 + JUMP * expected
        change = (target - expected) * min(1.0, step / SETTLE)
        self._left = expected + min(max(change, -most), most)
