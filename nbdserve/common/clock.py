"""Time limits on others, in which the time does not count in which this process was stopped itself.

Whoever is stopped (SIGSTOP, Ctrl-Z, a debugger, a machine that swaps) sees nothing of what happens meanwhile;
when it goes on every limit would be over at once, although everybody else was in time. So a limit counts by a
clock that is looked at several times a second, and that takes a long time between two looks for a stop.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

TICK = 0.1
"""Seconds after which the clock is looked at again, at the latest."""

MOST = 0.25
"""Seconds that count between two looks, at most; more than a tick, as a busy machine is late at times."""


class Clock:
    """Seconds that have passed for this process. Not for several threads at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen = self._now = clock()

    def now(self) -> float:
        """Return the time in seconds, as by time.monotonic() but without the stops."""
        seen = self._clock()
        self._now += min(seen - self._seen, MOST)
        self._seen = seen
        return self._now


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose timers go by a Clock: asyncio.sleep, asyncio.timeout, asyncio.wait and so on."""

    def __init__(self) -> None:
        self._limits = Clock()
        super().__init__(_Ticking())

    def time(self) -> float:
        """Return the Clock's time in seconds."""
        return self._limits.now()


class _Ticking(selectors.DefaultSelector):
    """Waits for a tick at most, so that the loop looks at its clock."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Without a timer no time counts, however long it is.
        return super().select(None if timeout is None else min(timeout, TICK))


def run(work: Coroutine[Any, Any, T]) -> T:
    """Do what asyncio.run() does, on a Loop."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(work)


def now() -> float:
    """Return the time in seconds by which the limits of the running event loop go."""
    return asyncio.get_running_loop().time()
