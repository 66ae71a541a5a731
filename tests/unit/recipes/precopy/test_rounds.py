"""The order of the rounds, and what is told of them: with a copier and a tracker that do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nbdserve.common import clock
from recipes.errors import MigrationError
from recipes.migrate.journal import CUTOVER_ASKED
from recipes.migrate.progress import PrecopyProgress, Progress
from recipes.migrate.runtime import Migration
from recipes.plans.policy import parse_cutover
from recipes.precopy import rounds as module
from recipes.precopy.convergence import Pace, Verdict
from recipes.precopy.rounds import Rounds
from recipes.precopy.tracker import Tracker

MIB = 1 << 20


class Guest:
    """What a guest changes during each round, in bytes; the last one for ever."""

    def __init__(self, *changes: int) -> None:
        self._changes = list(changes)
        self.added = 0.01
        self.advanced = 0

    async def dirty(self) -> int:
        return self._changes[0]

    async def advance(self) -> int:
        self.advanced += 1
        return self._changes.pop(0) if len(self._changes) > 1 else self._changes[0]

    async def finish(self) -> int:
        return self._changes[0]

    async def close(self) -> None:
        """Nothing is open."""


class Copies:
    """A copier that has a MiB per second, and for which each look is the end of a round."""

    is_done = True
    expected = Pace(float(MIB), 0.0, 0.5)

    def __init__(self, whole: int) -> None:
        self.moved = 0
        self.missing = 0
        self._whole = whole
        self.fails = ""

    async def start(self) -> None:
        """It has begun."""

    async def settle(self) -> None:
        """It is on stable storage."""

    def measured(self, count: int, seconds: float) -> None:
        """It is known how fast it is."""

    async def look(self) -> Progress:
        if self.fails:
            raise MigrationError(self.fails)
        self.moved = self._whole
        return Progress(self._whole, self._whole, float(MIB), 0.0)

    async def rest(self, seconds: float) -> None:
        await asyncio.sleep(0)


class Stage:
    """A migration of which only this is there."""

    def __init__(self, directory: Path, cutover: str) -> None:
        self.plan = SimpleNamespace(cutover=parse_cutover(cutover, "cutover"))
        self.state = SimpleNamespace(name="vm")
        self.journal = SimpleNamespace(directory=directory, note_progress=lambda **_: None)
        self.report = SimpleNamespace(precopy=self._told, note=self._noted)
        self.looks: list[PrecopyProgress] = []
        self.notes: list[str] = []
        self.needed: dict[str, Awaitable[str]] = {}
        self.asks_after: int | None = None

    def _told(self, progress: PrecopyProgress) -> None:
        self.looks.append(progress)
        if self.asks_after is not None and progress.number >= self.asks_after:
            (self.journal.directory / CUTOVER_ASKED).write_text("now")

    def _noted(self, text: str) -> None:
        self.notes.append(text)

    def need(self, name: str, end: Awaitable[str]) -> None:
        self.needed[name] = end

    def no_longer_need(self, name: str) -> None:
        self.needed.pop(name, None)

    def refuse_the_dead(self) -> None:
        for name, end in self.needed.items():
            if isinstance(end, asyncio.Future) and end.done():
                raise MigrationError(f"{name} {end.result()}")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """Rounds that take no time, of a disk with 100 MiB."""
    made = Copies(100 * MIB)
    monkeypatch.setattr(module, "Copier", lambda _: made)
    monkeypatch.setattr(module, "LOOK", 0.001)
    monkeypatch.setattr(module, "REST", 0.01)
    return made


def played(stage: Stage, guest: Guest, body: Callable[[Rounds], Awaitable[Any]]) -> Any:
    """What comes of this."""

    async def play() -> Any:
        rounds = Rounds(cast(Migration, stage), cast(Tracker, guest))
        try:
            return await body(rounds)
        finally:
            await rounds.close()

    return clock.run(play())


async def until_the_guest_goes(rounds: Rounds) -> tuple[Verdict, str, dict[str, Any]]:
    verdict = await rounds.run()
    return verdict, rounds.summary(verdict), await rounds.finish()


def test_there_are_rounds_as_long_as_they_halve_and_what_is_left_is_for_the_window(
    tmp_path: Path, copies: Copies
) -> None:
    guest = Guest(40 * MIB, 15 * MIB, 10 * MIB)
    verdict, said, told = played(Stage(tmp_path, "auto"), guest, until_the_guest_goes)
    assert (verdict, guest.advanced) == (Verdict.DIVERGES, 2)
    assert "in 3 rounds before the cut-over" in said
    assert "10 MiB were changed since the last one began, more than half of it" in said
    assert [(each.number, each.bytes) for each in told["rounds"]] == [
        *((0, 100 * MIB), (1, 40 * MIB), (2, 15 * MIB))
    ]
    assert (told["prediction"].missing, told["prediction"].seconds) == (10 * MIB, pytest.approx(10.5))


def test_little_that_is_left_is_no_lack_of_convergence(tmp_path: Path, copies: Copies) -> None:
    verdict, said, told = played(Stage(tmp_path, "auto"), Guest(64 << 10), until_the_guest_goes)
    assert verdict is Verdict.CONVERGED
    assert "in one round before the cut-over; 64 KiB were changed since the last one began" in said
    assert told["prediction"].missing == 64 << 10


@pytest.mark.parametrize("cutover", ["manual", "when-converged", "at-window 3"])
def test_a_guest_that_is_waited_for_goes_when_it_is_asked_to(
    tmp_path: Path, copies: Copies, cutover: str
) -> None:
    stage = Stage(tmp_path, cutover)
    stage.asks_after = 2
    verdict, said, _ = played(stage, Guest(90 * MIB), until_the_guest_goes)
    assert (verdict, stage.looks[-1].number) == (Verdict.ASKED, 2)
    assert "the cut-over was asked for" in said
    assert [note.endswith("nbd-migrate cutover vm") for note in stage.notes] == [True]
    assert stage.looks[-1].window == pytest.approx(90.5)


def test_rounds_go_on_beside_the_ram_and_each_is_counted_once(tmp_path: Path, copies: Copies) -> None:
    guest = Guest(MIB)

    async def body(rounds: Rounds) -> dict[str, Any]:
        await rounds.run()
        rounds.go_on_aside()
        async with asyncio.timeout(60):
            while guest.advanced < 3:
                await asyncio.sleep(0.001)
        return await rounds.finish()

    told = played(Stage(tmp_path, "auto"), guest, body)
    numbers = [each.number for each in told["rounds"]]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) >= 3


def test_what_fails_beside_the_ram_keeps_the_guest_on_a(tmp_path: Path, copies: Copies) -> None:
    stage = Stage(tmp_path, "auto")

    async def body(rounds: Rounds) -> None:
        await rounds.run()
        copies.fails = "there is no space left"
        rounds.go_on_aside()
        [(name, end)] = stage.needed.items()
        async with asyncio.timeout(60):
            assert await end == "has failed: there is no space left"
        assert "copying" in name
        with pytest.raises(MigrationError, match="has failed: there is no space left"):
            await rounds.finish()

    played(stage, Guest(MIB), body)
