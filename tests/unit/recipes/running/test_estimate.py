"""The time left of a stream: right on a steady link, and without nonsense on any other."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from recipes.running.estimate import STALL, Estimate

MIB = 1 << 20
STEP = 0.5


def told(
    total: int, rate: Callable[[float], float], most: float = 3600.0
) -> Iterator[tuple[float, float | None, float]]:
    """Yield when, the time left and the rate that are told of a stream of so many bytes."""
    estimate, now, moved = Estimate(), 1000.0, 0.0
    while moved < total and now < 1000.0 + most:
        estimate.note(now, int(moved), total - int(moved))
        yield now - 1000.0, estimate.left, estimate.rate
        moved = min(float(total), moved + rate(now - 1000.0) * STEP)
        now += STEP


@pytest.mark.parametrize("seconds", [8, 20, 60, 600, 3000])
@pytest.mark.parametrize("noise", [0.0, 0.25])
@pytest.mark.parametrize("seed", range(3))
def test_on_a_steady_link_it_is_right_from_a_quarter_of_the_way_on(
    seconds: int, noise: float, seed: int
) -> None:
    chance = random.Random(seed)
    if noise and seconds < 60:
        seconds = 60
    looks = list(told(seconds * 10 * MIB, lambda _: 10 * MIB * (1 + noise * chance.uniform(-1, 1))))
    end = looks[-1][0] + STEP
    for when, left, rate in looks:
        if when >= end / 4:
            assert left is not None
            # In the end a tenth is less than what passes between two looks, and than what nobody can know.
            assert abs(left - (end - when)) <= max(0.1 * (end - when), 3.0 if noise else 2 * STEP), when
            assert rate == pytest.approx(10 * MIB, rel=0.1 if noise else 0.01)


def test_it_follows_a_link_that_changes_without_a_jump() -> None:
    looks = list(told(600 * MIB, lambda when: 10 * MIB if when < 20 else 2 * MIB))
    end = looks[-1][0] + STEP
    for (_, before, _), (when, left, _) in pairwise(looks):
        if before is not None:
            assert left is not None
            assert abs(left - (before - STEP)) <= max(2.0, 0.25 * before), when
    # A minute after the change it has followed.
    assert all(left == pytest.approx(end - when, rel=0.1) for when, left, _ in looks if 85 < when < end - 10)


@pytest.mark.parametrize("length", [1.0, 4.0, 6.0, 30.0, 600.0])
def test_a_stall_is_told_and_is_no_part_of_the_estimate_behind_it(length: float) -> None:
    looks = list(told(400 * MIB, lambda when: 0 if 20 <= when < 20 + length else 10 * MIB, 2000))
    during = [look for look in looks if 20 + STALL + STEP <= look[0] < 20 + length]
    assert all((left, rate) == (None, 0.0) for _, left, rate in during)
    assert (length > STALL + STEP) == bool(during)
    behind = [look for look in looks if look[0] > 20 + length + STEP]
    for when, left, _ in behind:
        assert left is not None
        rest = 40 + length - when
        assert abs(left - rest) <= max(0.4 * rest, STALL + 1), (when, left, rest)
    last = [left for _, left, _ in behind[-5:]]
    assert last == sorted(last, reverse=True)  # type: ignore[type-var]


@pytest.mark.parametrize("seed", range(20))
def test_it_is_never_negative_and_never_jumps_whatever_the_link_does(seed: int) -> None:
    chance = random.Random(seed)
    rates = [chance.choice([0, 0, 1, 5, 50, 200]) * MIB for _ in range(40)]
    looks = list(told(4000 * MIB, lambda when: rates[int(when / 7) % 40]))
    known = [(when, left) for when, left, _ in looks if left is not None]
    assert known
    for (then, before), (when, left) in pairwise(known):
        assert left >= 0
        if when - then == STEP:
            assert abs(left - before) <= 2.0 + 0.2 * before, when


def test_what_needs_not_be_moved_shortens_the_time_left() -> None:
    estimate = Estimate()
    for look in range(40):
        estimate.note(look * STEP, look * 5 * MIB, 1000 * MIB - look * 5 * MIB)
    assert estimate.left == pytest.approx((1000 - 195) / 10, rel=0.05)
    for look in range(40, 60):
        estimate.note(look * STEP, look * 5 * MIB, 500 * MIB - look * 5 * MIB)
    assert estimate.left == pytest.approx((500 - 295) / 10, rel=0.1)
    assert estimate.rate == pytest.approx(10 * MIB)


def test_what_is_there_already_takes_no_time() -> None:
    estimate = Estimate()
    estimate.note(0.0, 0, 0)
    assert (estimate.left, estimate.rate) == (0.0, 0.0)
    estimate.note(100.0, 0, 0)
    assert estimate.rate == 0.0


def test_another_beginning_is_taken_for_one() -> None:
    estimate = Estimate()
    for look in range(20):
        estimate.note(look * STEP, look * MIB, 1000 * MIB)
    estimate.restart()
    for look in range(20, 40):
        estimate.note(look * STEP, (look - 20) * 4 * MIB, 1000 * MIB)
    assert estimate.rate == pytest.approx(8 * MIB)
