"""The long run of ``make soak``, made short: all its clients, and its verdict on what does grow."""

from __future__ import annotations

import pytest

from tests.soak.__main__ import main
from tests.soak.watch import trend


def test_a_short_run_answers_every_request_as_it_must(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--millions", "0.1", "--rounds", "5"])
    said = capsys.readouterr().out
    assert "requests answered as they must be" in said
    assert "descriptors" in said.splitlines()[-2]


def test_what_grows_is_told_from_what_only_trembles() -> None:
    trembling = [100.0, 103, 99, 101, 102, 100, 98, 103, 101, 99]
    assert trend(trembling).is_flat(3)
    growing = [value + 2 * index for index, value in enumerate(trembling)]
    assert not trend(growing).is_flat(3)
    filling = [0.0, 50, *trembling]
    assert trend(filling).is_flat(3), "the warm-up does not count"
    assert not trend([*trembling[:6], *(value + 10 for value in trembling[6:])]).is_flat(3), "a late step"
