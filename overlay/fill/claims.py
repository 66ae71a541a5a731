"""Who fetches which part of the disk at this moment: several who miss the same part make one fetch.

A guest's write takes no claim, and waits for none unless it covers a part of an absent cluster. A fetch that
is under way for what it writes is not stopped: ``Image.fill`` stores only what is still absent at that
instant, so the write wins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

UNIT = 64 << 10
"""Bytes that are claimed together, unless an image's clusters are larger."""
_MOMENT = 1.0
"""Seconds after which who waits for another's claim looks whether that still makes sense."""


class Claim(NamedTuple):
    """The right to fetch a range of bytes. Whoever else needs it waits until it is released."""

    offset: int
    length: int
    done: threading.Event
    asked_at: int
    """How many invalidations there had been: after another one what is fetched may be out of date."""

    def wait(self) -> bool:
        """Wait a moment until it is released; False if it is not yet. Who holds it has limits of its own."""
        return self.done.wait(_MOMENT)


class Claims:
    """The claims on one disk of ``size`` bytes.

    Safe for several threads. The lock is held while :meth:`take` asks what is wanted, so the image's locks
    are taken under it, and its tables may have to be read; nobody waits for a claim under it.
    """

    def __init__(self, size: int, unit: int = UNIT) -> None:
        self.unit = unit
        self._size = size
        self._lock = threading.Lock()
        self._held: dict[int, Claim] = {}

    def take(
        self, offset: int, length: int, wanted: Callable[[int, int], bool], longest: int, asked_at: int = 0
    ) -> tuple[list[Claim], list[Claim]]:
        """Claim the units of a range for which ``wanted`` (offset, length) says so at this instant.

        Returns our claims, none over ``longest`` bytes, and those of others that stand in the way.
        """
        # Nothing is held before all is decided: ``wanted`` raises where an image is damaged.
        free: list[tuple[int, int]] = []
        others: list[Claim] = []
        unit = self.unit
        with self._lock:
            begin = end = -1
            for number in range(offset // unit, -(-(offset + length) // unit)):
                start = number * unit
                stop = min(start + unit, self._size)
                other = self._held.get(number)
                if other is not None:
                    if not others or others[-1] is not other:
                        others.append(other)
                elif wanted(start, stop - start):
                    if start != end or stop - begin > longest:
                        free.append((begin, end))
                        begin = start
                    end = stop
            free.append((begin, end))
            return [self._hold(*part, asked_at) for part in free if part[1] > part[0]], others

    def release(self, claim: Claim) -> None:
        """Give a claim back, whatever came of it."""
        unit = self.unit
        with self._lock:
            for number in range(claim.offset // unit, -(-(claim.offset + claim.length) // unit)):
                del self._held[number]
        claim.done.set()

    @property
    def idle(self) -> bool:
        """Tell whether nobody fetches anything."""
        return not self._held

    def _hold(self, begin: int, end: int, asked_at: int) -> Claim:
        claim = Claim(begin, end - begin, threading.Event(), asked_at)
        for number in range(begin // self.unit, -(-end // self.unit)):
            self._held[number] = claim
        return claim
