"""The operator's word that the guest is to go: it is there until the run takes it, and taken once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from recipes.errors import MigrationError
from recipes.migrate.runtime import Migration
from recipes.running.cutover_wish import ask, was_asked


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
