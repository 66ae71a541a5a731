"""Limits go on when this process does: the time in which it was stopped does not count."""

from __future__ import annotations

import asyncio
import time

import pytest

from nbdserve.common import clock
from nbdserve.common.clock import MOST, TICK, Clock, now


def test_time_passes_as_it_does_for_everybody() -> None:
    seconds = 100.0
    limits = Clock(lambda: seconds)
    assert limits.now() == 100.0
    for _ in range(100):
        seconds += TICK
        limits.now()
    assert limits.now() == pytest.approx(110.0)


def test_of_a_stop_no_more_than_a_moment_counts() -> None:
    seconds = 100.0
    limits = Clock(lambda: seconds)
    seconds += 3600.0
    assert limits.now() == 100.0 + MOST
    seconds += TICK
    assert limits.now() == pytest.approx(100.0 + MOST + TICK)


def test_a_wait_for_long_is_as_long_as_it_should_be() -> None:
    """The loop itself looks at its clock often enough for nothing to be taken for a stop."""

    async def rest() -> tuple[float, float]:
        began, began_here = time.monotonic(), now()
        await asyncio.sleep(8 * MOST)
        here = now() - began_here
        return time.monotonic() - began, here

    real, here = clock.run(rest())
    assert here >= 8 * MOST
    assert here <= real + 1e-6


def test_a_limit_is_not_over_after_a_stop_that_was_longer() -> None:
    async def work() -> str:
        answer = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(4 * MOST):
            time.sleep(8 * MOST)  # nothing runs in this process, as if it were stopped
            asyncio.get_running_loop().call_later(TICK, answer.set_result, "in time")
            return str(await answer)

    assert clock.run(work()) == "in time"


def test_a_limit_ends_a_wait_for_somebody_who_is_silent() -> None:
    async def work() -> None:
        async with asyncio.timeout(MOST):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        clock.run(work())
