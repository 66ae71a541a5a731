"""Rates that can be believed, and progress that never goes backwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from overlay.fill.progress import Meter, Progress
from overlay.formats.open import open_image
from tests.support.disks import MIB, random_bytes
from tests.support.overlays import make_overlay


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_steady_rate_is_told_as_it_is_from_the_first_second_on() -> None:
    clock = Clock()
    meter = Meter(clock)
    for second in range(1, 60):
        for _ in range(10):
            clock.now += 0.1
            meter.passed(100)
        rate = meter.rate()
        assert rate == pytest.approx(1000, rel=0.03), second
    assert meter.total == 59_000


def test_a_rate_is_not_known_at_once() -> None:
    clock = Clock()
    meter = Meter(clock)
    meter.passed(1 << 30)
    assert meter.rate() is None
    clock.now += 1.0
    assert meter.rate()
    meter.restart()
    assert meter.rate() is None


def test_a_rate_follows_what_changes_within_seconds_and_fades_when_nothing_comes() -> None:
    clock = Clock()
    meter = Meter(clock)
    for rate in (100, 1000):
        for _ in range(300):
            clock.now += 0.05
            meter.passed(rate // 20)
    assert meter.rate() == pytest.approx(1000, rel=0.05)
    clock.now += 20
    left = meter.rate()
    assert left is not None
    assert left < 10


def test_progress_does_not_go_back_when_copies_are_taken_away(tmp_path: Path) -> None:
    path = make_overlay(tmp_path / "disk", "flat", 4 * MIB, "nbd://localhost")
    with open_image(path, writable=True) as image:
        progress = Progress(image)
        image.fill(0, random_bytes(MIB))
        assert progress.look() == (MIB, 4 * MIB)
        progress.take_away(lambda: image.invalidate([(0, MIB // 2)]))
        assert image.local_bytes == MIB // 2
        assert progress.look() == (MIB, 4 * MIB + MIB // 2)
        image.fill(0, random_bytes(4 * MIB))
        assert progress.look() == (4 * MIB + MIB // 2, 4 * MIB + MIB // 2)


def test_progress_is_told_while_copies_are_being_taken_away_and_does_not_go_back_then(tmp_path: Path) -> None:
    path = make_overlay(tmp_path / "disk", "flat", 4 * MIB, "nbd://localhost")
    with open_image(path, writable=True) as image, ThreadPoolExecutor() as pool:
        progress = Progress(image)
        image.fill(0, random_bytes(MIB))
        told: list[tuple[int, int]] = []

        def take() -> None:
            image.invalidate([(0, MIB // 2)])
            told.append(pool.submit(progress.look).result(60))

        progress.take_away(take)
        assert told == [(MIB, 4 * MIB)]
        assert progress.look() == (MIB, 4 * MIB + MIB // 2)
