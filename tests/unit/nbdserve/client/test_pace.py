"""How much is asked for at once: on links that are simulated, with all that a link does to an answer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from nbdserve.client.pace import Pace
from tests.support.disks import KIB, MIB

SHORTEST, FIRST, LONGEST = 16 * KIB, 64 * KIB, MIB


@dataclass
class Link:
    """A link of so many bytes a second, behind which each request takes so many seconds besides."""

    rate: float
    latency: float
    now: float = 1000.0

    def __post_init__(self) -> None:
        self.pace = Pace(SHORTEST, FIRST, LONGEST, lambda: self.now)

    def pass_on(self, requests: int) -> list[int]:
        """Ask for one thing after the other; how much at each time."""
        lengths = []
        for _ in range(requests):
            length, sent = self.pace.length, self.now
            self.now += self.latency + length / self.rate
            self.pace.answered(length, sent)
            lengths.append(length)
        return lengths


@pytest.mark.parametrize("rate", [16e3, 32e3, 125e3, 500e3])
def test_on_a_slow_link_an_answer_takes_about_a_second(rate: float) -> None:
    link = Link(rate, 0.01)
    link.pass_on(12)
    begun = link.now
    link.pass_on(10)
    assert 0.3 <= (link.now - begun) / 10 <= 2.1
    assert link.pace.is_slow
    assert link.pace.rate == pytest.approx(rate, rel=0.1)


@pytest.mark.parametrize("latency", [0.0001, 0.02, 0.2])
def test_on_a_quick_link_the_longest_are_asked_for_after_a_few(latency: float) -> None:
    link = Link(1e9, latency)
    assert link.pass_on(6) == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST, LONGEST, LONGEST]
    assert not link.pace.is_slow


@pytest.mark.parametrize("latency", [3.0, 12.0, 60.0])
def test_where_each_answer_takes_long_however_short_it_is_long_ones_are_asked_for(latency: float) -> None:
    assert Link(10e6, latency).pass_on(20)[-8:] == [LONGEST] * 8


def test_a_link_that_becomes_slow_and_quick_again_is_followed() -> None:
    link = Link(1e9, 0.001)
    link.pass_on(6)
    link.rate = 32e3
    link.pass_on(4)
    assert link.pace.length <= 64 * KIB
    link.rate = 1e9
    link.pass_on(12)
    assert link.pace.length == LONGEST


def test_short_answers_alone_show_that_a_link_has_become_slow() -> None:
    link = Link(1e9, 0.001)
    link.pass_on(6)
    sent = link.now
    link.now += 4.0
    link.pace.answered(64 * KIB, sent)
    assert link.pace.length == 64 * KIB


def test_little_is_under_way_before_an_answer_so_long_has_come() -> None:
    link = Link(32e3, 0.0)
    assert link.pace.room == FIRST
    link.pass_on(12)
    assert link.pace.room == 2 * link.pace.length


def test_what_waits_behind_other_answers_is_not_slow() -> None:
    link = Link(100e6, 0.0)
    sent = link.now
    for _ in range(100):  # all of them sent at once
        link.now += MIB / link.rate
        link.pace.answered(MIB, sent)
    assert not link.pace.is_slow
    assert link.pace.rate == pytest.approx(100e6, rel=0.01)
