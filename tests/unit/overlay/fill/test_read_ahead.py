"""What is read ahead: for readers that go on where they were, and for nobody else."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from overlay.fill.read_ahead import FIRST, LARGEST, ReadAhead

KIB, MIB = 1 << 10, 1 << 20
SIZE = 1 << 40


def test_the_first_miss_says_nothing_of_what_comes_next() -> None:
    assert ReadAhead(SIZE).after(10 * MIB, 4 * KIB) is None


def test_a_reader_that_goes_on_is_read_ahead_for_from_where_it_is() -> None:
    ahead = ReadAhead(SIZE)
    ahead.after(0, 64 * KIB)
    assert ahead.after(64 * KIB, 64 * KIB) == (128 * KIB, FIRST)


def test_what_is_read_ahead_doubles_up_to_a_limit_and_leaves_no_gap() -> None:
    ahead = ReadAhead(SIZE)
    ahead.after(0, 64 * KIB)
    missed = 64 * KIB
    lengths: list[int] = []
    for _ in range(12):
        found = ahead.after(missed, 64 * KIB)
        assert found is not None
        # The reader misses the first bytes that are not here; what is fetched for it is not fetched ahead.
        assert found[0] == missed + 64 * KIB
        lengths.append(found[1])
        missed = sum(found)
    assert (lengths[0], lengths[-1]) == (FIRST, LARGEST)
    assert all(later == min(2 * earlier, LARGEST) for earlier, later in pairwise(lengths))


def test_random_readers_are_not_read_ahead_for() -> None:
    ahead, chance = ReadAhead(SIZE), random.Random(1)
    found = [ahead.after(chance.randrange(SIZE // 4096 - 16) * 4096, 4096) for _ in range(1000)]
    assert found.count(None) > 990


def test_several_readers_at_once_are_each_followed() -> None:
    ahead = ReadAhead(SIZE)
    places = [number << 32 for number in range(8)]
    for place in places:
        ahead.after(place, MIB)
    assert [ahead.after(place + MIB, MIB) for place in places] == [
        (place + 2 * MIB, FIRST) for place in places
    ]


@pytest.mark.parametrize("tail", [0, 1, 512, 100 * KIB])
def test_nothing_is_read_ahead_beyond_the_end_of_the_disk(tail: int) -> None:
    ahead = ReadAhead(2 * MIB + tail)
    ahead.after(0, MIB)
    assert ahead.after(MIB, MIB) == ((2 * MIB, tail) if tail else None)


def test_how_many_readers_are_remembered_is_bounded() -> None:
    ahead = ReadAhead(SIZE)
    ahead.after(0, 4 * KIB)
    for number in range(1, 10_000):
        ahead.after(number << 20, 4 * KIB)
    assert ahead.after(4 * KIB, 4 * KIB) is None
