"""How far copying has come, how fast it goes, and how long it will take."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from overlay.formats.image import Image

SMOOTHING = 4.0
"""Seconds over which a rate is smoothed: what is older than three times that hardly counts."""
_WARM_UP = 1.0
"""Seconds in which a rate says nothing yet."""


class Meter:
    """Counts bytes, and tells at which rate they came lately. Safe for several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = 0
        self._clock = clock
        self._lock = threading.Lock()
        self._begin = self._last = clock()
        self._recent = 0.0
        """The bytes that came, each counting the less the longer ago it came."""

    def passed(self, length: int) -> None:
        """So many bytes came."""
        with self._lock:
            self._fade()
            self._recent += length
            self.total += length

    def restart(self) -> None:
        """Measure the rate from now on."""
        with self._lock:
            self._begin = self._last = self._clock()
            self._recent = 0.0

    def rate(self) -> float | None:
        """Return the bytes a second lately; None while that is not known yet."""
        with self._lock:
            self._fade()
            measured = self._last - self._begin
            if measured < _WARM_UP:
                return None
            return self._recent / (SMOOTHING * -math.expm1(-measured / SMOOTHING))

    def _fade(self) -> None:
        now = self._clock()
        self._recent *= math.exp((self._last - now) / SMOOTHING)
        self._last = now


class Progress:
    """What there was to do, and what of it is done, in bytes. Neither ever decreases.

    As with QEMU's jobs, what has to be done once more counts on both sides.

    Safe for several threads. ``_taking`` lets one after the other take parts away, for as long as that takes.
    """

    def __init__(self, image: Image) -> None:
        self._image = image
        self._taking = threading.Lock()
        self._lock = threading.Lock()
        """Held for moments only, as whoever looks is in a hurry; taken second where both are."""
        self._done = 0
        """What was told last."""
        self._again = 0
        """Bytes that were taken away after they had been copied."""

    def take_away(self, take: Callable[[], None]) -> None:
        """Do what makes parts of the image absent again. May wait for a server, and for the disk."""
        with self._taking:
            self.look()
            before = self._image.local_bytes
            try:
                take()
            finally:
                with self._lock:
                    # What is copied meanwhile is progress too.
                    self._again += max(0, before - self._image.local_bytes)

    def look(self) -> tuple[int, int]:
        """Return (done, in all)."""
        with self._lock:
            # What is being taken away is not accounted for yet.
            self._done = max(self._done, self._image.local_bytes + self._again)
            return self._done, self._image.size + self._again
