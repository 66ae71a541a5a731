"""When the guest goes to B, by how the rounds of copying go."""

from __future__ import annotations

import pytest

from nbdserve.common.errors import UsageError
from recipes.plans.policy import Cutover, parse_cutover
from recipes.precopy.convergence import Look, Pace, Verdict, judge

MIB = 1 << 20
AUTO, CONVERGED, MANUAL = (parse_cutover(kind, "x") for kind in ("auto", "when-converged", "manual"))


def test_another_round_is_worth_it_as_long_as_they_halve() -> None:
    assert judge(AUTO, Look(100 * MIB, 50 * MIB, 5.0, 5.5)) is Verdict.AGAIN
    assert judge(AUTO, Look(100 * MIB, 51 * MIB, 5.0, 5.5)) is Verdict.DIVERGES


@pytest.mark.parametrize("cutover", [AUTO, CONVERGED])
def test_the_guest_goes_when_little_is_left_however_the_rounds_went(cutover: Cutover) -> None:
    assert judge(cutover, Look(10, 10, 0.9, 9.0)) is Verdict.CONVERGED
    assert judge(cutover, Look(100 * MIB, 10 * MIB, 1.1, 1.2)) is Verdict.AGAIN


def test_who_waits_for_convergence_goes_on_with_rounds_that_do_not_halve() -> None:
    assert judge(CONVERGED, Look(100 * MIB, 100 * MIB, 60.0, 61.0)) is Verdict.AGAIN
    assert judge(CONVERGED, Look(100 * MIB, 100 * MIB, None, None)) is Verdict.AGAIN


def test_a_window_may_be_as_long_as_is_said() -> None:
    at_window = parse_cutover("at-window 30", "x")
    assert judge(at_window, Look(100 * MIB, 100 * MIB, 29.0, 31.0)) is Verdict.AGAIN
    assert judge(at_window, Look(100 * MIB, 100 * MIB, 29.0, 30.0)) is Verdict.CONVERGED


def test_a_guest_that_waits_for_a_word_does_not_go_by_itself() -> None:
    assert judge(MANUAL, Look(100 * MIB, 0, 0.0, 0.1)) is Verdict.AGAIN


def test_a_window_is_what_is_missing_beside_the_parting_with_a_and_what_comes_behind_both() -> None:
    assert Pace(MIB, 2.0, 0.5).window(10 * MIB) == pytest.approx(10.5)
    assert Pace(MIB, 2.0, 0.5).window(MIB) == pytest.approx(2.5)
    assert Pace(MIB, 2.0, 0.5).rest(10 * MIB) == pytest.approx(10.0)
    assert Pace(0.0, 2.0, 0.5).window(0) == 2.5
    assert Pace(0.0, 2.0, 0.5).window(1) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "auto 3",
        "manual 1",
        "at-window",
        "at-window x",
        "at-window 0",
        "at-window -1",
        "at-window inf",
        "at-window nan",
        "AUTO",
    ],
)
def test_what_is_no_cutover_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"^destination\.cutover: .* auto, when-converged, at-window SECONDS"
    ):
        parse_cutover(text, "destination.cutover")
