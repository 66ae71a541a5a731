"""What is done where nobody can be accepted for a while, for lack of descriptors or memory.

Who waits stays in the queue of the listening socket, so that it is ready all the time: whoever polls it must
pause, or would do nothing else, and must not fill a log with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

ACCEPT_PAUSE = 0.2
"""Seconds to wait when no client can be accepted."""

INTERVAL = 60.0
"""Seconds between two lines that say the same."""


class AcceptFailures:
    """Those of one listener, of which the first is told, and then one a minute. For one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[int | None, float] = {}

    def is_news(self, error: OSError) -> bool:
        """Tell whether this one is to be told."""
        now = self._clock()
        if now < self._told.get(error.errno, now):
            return False
        self._told[error.errno] = now + INTERVAL
        return True
