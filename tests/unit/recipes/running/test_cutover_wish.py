"""The operator's word that the guest is to go: it is there until the run takes it, and taken once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from recipes.errors import MigrationError
from recipes.migrate.runtime import Migration
from recipes.running import asking, cutover_wish
from recipes.running.cutover_wish import WISH, ask, was_asked


class Run:
    """A run that takes what is asked after so many looks, or never."""

    def __init__(self, directory: Path, takes_after: int) -> None:
        self.m = cast(Migration, SimpleNamespace(journal=SimpleNamespace(directory=directory)))
        self._takes_after, self.looks = takes_after, 0
        self.taken: list[bool] = []

    def actor(self) -> int:
        return 4711

    def doing(self) -> str:
        return "step 3, B's QEMU"

    def sleep(self, _: float) -> None:
        self.looks += 1
        if self.looks >= self._takes_after:
            self.taken.append(was_asked(self.m))


def test_the_guest_is_asked_to_go_once(tmp_path: Path) -> None:
    run = Run(tmp_path, takes_after=2)
    assert not was_asked(run.m)
    ask(tmp_path, run, run.sleep)
    assert run.taken == [True]
    assert not was_asked(run.m)


def test_a_run_that_does_not_take_it_is_asked_no_more(tmp_path: Path) -> None:
    run = Run(tmp_path, takes_after=1 << 30)
    with pytest.raises(MigrationError, match=r"has not taken this within 60 s, .* step 3, B's QEMU"):
        ask(tmp_path, run, run.sleep)
    assert not was_asked(run.m)


def test_what_the_run_is_at_is_told_soon_and_once(tmp_path: Path) -> None:
    """It may wait for somebody who does not answer, for as long as nobody can guess."""
    run, told = Run(tmp_path, takes_after=100), list[str]()
    ask(tmp_path, run, run.sleep, told.append)
    [line] = told
    assert line.startswith(f"{tmp_path.name}: the run has not taken this yet, as it is at: step 3, B's QEMU")
    assert "; it has 58 s more" in line
    run = Run(tmp_path, takes_after=5)
    ask(tmp_path, run, run.sleep, told.append)
    assert len(told) == 1


def test_who_gives_up_between_the_two_names_of_what_is_taken_hears_that_it_counts(tmp_path: Path) -> None:
    class Slow(Run):
        """A run that is just giving it its second name."""

        def sleep(self, _: float) -> None:
            self.looks += 1
            asked, ours = (tmp_path / name for name in (WISH.asked, f"{WISH.taken}.mark"))
            if self.looks == self._takes_after:
                ours.hardlink_to(asked)
                raise KeyboardInterrupt
            if self.looks == self._takes_after + 3:
                assert not asked.exists()
                ours.replace(tmp_path / WISH.taken)

    run = Slow(tmp_path, takes_after=2)
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path, run, run.sleep)
    assert run.looks == 5


def test_who_gives_up_just_as_it_is_taken_is_told_what_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, said = Run(tmp_path, takes_after=1 << 30), asking.text

    def seen_a_moment_ago(directory: Path, name: str) -> str:
        """What a run has read before it was withdrawn."""
        return asked if name == cutover_wish.WISH.asked else said(directory, name)

    with pytest.raises(MigrationError, match="nothing was changed"):
        ask(tmp_path, run, run.sleep)
    asked = '{"mark": "ours"}'
    with monkeypatch.context() as context:
        context.setattr(asking, "text", seen_a_moment_ago)
        assert not was_asked(run.m), "it was withdrawn before it was taken"

    withdraw = asking.withdraw

    def too_late(directory: Path, wish: asking.Wish, asked: str) -> None:
        assert was_asked(run.m)
        withdraw(directory, wish, asked)

    monkeypatch.setattr(asking, "withdraw", too_late)
    ask(tmp_path, run, run.sleep)
