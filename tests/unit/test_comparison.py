"""Two versions side by side: what rounds tell of them, and what they cannot."""

from __future__ import annotations

import pytest

from tests.bench.comparison import Comparison, ranks_to_cut
from tests.bench.measure import turns


def comparison(*ratios: float) -> Comparison:
    """A row in which the other version did 2, 4, 8... as the machine had time, and we so many times that."""
    theirs = [2.0**number for number in range(1, len(ratios) + 1)]
    return Comparison(
        "a row", "MiB/s", [rate * ratio for rate, ratio in zip(theirs, ratios, strict=True)], theirs
    )


def test_versions_are_compared_within_each_round_however_fast_the_machine_was_then() -> None:
    assert comparison(0.5, 0.5, 0.5).ratio == 0.5
    assert comparison(0.5, 0.5, 0.5).interval == (0.5, 0.5)


def test_the_interval_leaves_out_what_a_single_disturbance_has_done_to_nine_rounds() -> None:
    nine = comparison(1.01, 0.99, 1.0, 0.2, 1.02, 0.98, 1.0, 5.0, 1.0)
    assert nine.ratio == 1.0
    assert nine.interval == pytest.approx((0.98, 1.02))
    assert str(nine).startswith(" 1.000 [0.980 to 1.020]  a row: ")


# From the tables of the sign test at 5 %, two-sided.
@pytest.mark.parametrize(
    ("rounds", "cut"), [(1, 0), (2, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (15, 3), (20, 5), (25, 7)]
)
def test_the_interval_is_that_of_the_sign_test(rounds: int, cut: int) -> None:
    assert ranks_to_cut(rounds) == cut


def test_no_contender_is_always_the_first() -> None:
    assert [list(order) for order in turns(3, 4)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2], [2, 1, 0]]
