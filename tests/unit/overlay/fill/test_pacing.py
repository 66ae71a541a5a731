"""How much is in flight on a link, and how fast: against a clock and a link that are computed."""

from __future__ import annotations

import pytest

from overlay.fill.pacing import LARGEST, QUIET_STEP, SMALLEST, RateLimit, Window

MIB = 1 << 20


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fill(window: Window, clock: Clock, rate: float, latency: float, seconds: float) -> None:
    """Keep a link of so many bytes a second and so many seconds of latency as full as the window says."""
    step = MIB
    end = clock.now + seconds
    while clock.now < end:
        # A request waits for those before it on the link, then for the way.
        waited = max(latency, window.size / rate)
        clock.now += step * waited / window.size
        window.answered(step, waited)


@pytest.mark.parametrize("rate", [20 * MIB, 100 * MIB, 2000 * MIB])
@pytest.mark.parametrize("latency", [0.0002, 0.02])
def test_the_window_fills_the_link_and_does_not_grow_far_beyond(rate: float, latency: float) -> None:
    clock = Clock()
    window = Window(clock)
    fill(window, clock, rate, latency, 5.0)
    assert window.size >= min(rate * latency, LARGEST)
    assert SMALLEST <= window.size <= LARGEST
    assert window.rate == pytest.approx(min(rate, window.size / latency), rel=0.1)


def test_on_a_link_that_becomes_slow_requests_do_not_wait_for_one_another_for_ever() -> None:
    clock = Clock()
    window = Window(clock)
    fill(window, clock, 1000 * MIB, 0.01, 2.0)
    fill(window, clock, 10 * MIB, 0.01, 40.0)
    assert window.rate == pytest.approx(10 * MIB, rel=0.1)
    assert window.size <= 3 * SMALLEST


@pytest.mark.parametrize(("latency", "most"), [(0.0005, MIB), (0.02, 6 * MIB)])
def test_beside_guests_little_is_in_flight_but_a_long_link_is_not_empty(latency: float, most: int) -> None:
    clock = Clock()
    window = Window(clock)
    fill(window, clock, 1000 * MIB, latency, 5.0)
    assert QUIET_STEP <= window.quiet_size <= most < window.size
    assert latency < 0.001 or window.quiet_size >= 4 * MIB


def bytes_let_through(limit: RateLimit, clock: Clock, step: int, seconds: float) -> int:
    """How many bytes somebody passes who always has more."""
    passed, end = 0, clock.now + seconds
    while clock.now < end:
        delay = limit.delay()
        if delay > 0:
            clock.now += delay
            continue
        limit.passed(step)
        passed += step
    return passed


@pytest.mark.parametrize("speed", [4096, 100_000, 10 * MIB, 1000 * MIB])
def test_the_limit_holds_within_five_per_cent(speed: int) -> None:
    clock = Clock()
    limit = RateLimit(speed, clock)
    assert bytes_let_through(limit, clock, 4096, 10.0) == pytest.approx(10 * speed, rel=0.05)


def test_no_limit_is_no_delay() -> None:
    limit = RateLimit(0, Clock())
    limit.passed(1 << 40)
    assert limit.delay() <= 0


def test_what_was_not_used_is_not_saved_up() -> None:
    clock = Clock()
    limit = RateLimit(MIB, clock)
    clock.now += 3600
    assert bytes_let_through(limit, clock, 4096, 1.0) <= 1.06 * MIB


def test_a_change_of_speed_holds_at_once_and_forgives_the_past() -> None:
    clock = Clock()
    limit = RateLimit(1, clock)
    limit.passed(MIB)  # twelve days' worth
    limit.speed = MIB
    assert limit.delay() <= 0
    assert bytes_let_through(limit, clock, 4096, 10.0) == pytest.approx(10 * MIB, rel=0.05)
