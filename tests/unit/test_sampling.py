"""Of a large matrix the cells that stand for the others are always the same, and never none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.sampling import WITH_GUESTS, chosen


@pytest.mark.parametrize("count", range(1, 30))
def test_as_many_as_are_wanted_are_chosen_and_the_ends_are_among_them(count: int) -> None:
    for wanted in range(2, 12):
        indices = chosen(count, wanted)
        assert len(indices) == min(count, wanted)
        assert {0, count - 1} <= indices <= set(range(count))


def test_one_is_the_first() -> None:
    assert chosen(9, 1) == {0}


def collected(*arguments: str) -> set[str]:
    """Return the tests that pytest takes of a module with guests, with these arguments."""
    module = WITH_GUESTS / "test_pivot.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        *arguments,
        str(module),
    ]
    told = subprocess.run(
        command, cwd=WITH_GUESTS.parent.parent, capture_output=True, text=True, timeout=120, check=True
    )
    return {line.strip() for line in told.stdout.splitlines() if "::" in line}


def test_of_the_tests_with_guests_those_run_that_stand_for_others() -> None:
    short, everything = collected(), collected("-m", "")
    assert short
    assert short == collected("-m", "representative and not exhaustive")
    assert short < everything
