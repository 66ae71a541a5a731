"""Of a large matrix the cells that stand for the others are always the same, and never none."""

from __future__ import annotations

import pytest

from tests.support.sampling import chosen


@pytest.mark.parametrize("count", range(1, 30))
def test_as_many_as_are_wanted_are_chosen_and_the_ends_are_among_them(count: int) -> None:
    for wanted in range(2, 12):
        indices = chosen(count, wanted)
        assert len(indices) == min(count, wanted)
        assert {0, count - 1} <= indices <= set(range(count))


def test_one_is_the_first() -> None:
    assert chosen(9, 1) == {0}
