"""How long a window takes in any case, by what was rehearsed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from recipes.errors import MigrationError
from recipes.migrate.runtime import Migration
from recipes.plans.limits import Limits
from recipes.precopy import rehearsal as module
from recipes.precopy.rehearsal import QUESTIONS, REMOVALS, STARTS, Rehearsal

START, COMMAND, QUESTION, SYNC = 0.125, 0.03125, 0.0078125, 0.25
"""Seconds: fractions that add up exactly."""


class Clock:
    """Time that passes when something is done."""

    def __init__(self) -> None:
        self.now = 100.0

    async def passes(self, seconds: float) -> str:
        self.now += seconds
        return ""


def rehearsal(monkeypatch: pytest.MonkeyPatch, clock: Clock, disks: int, *, through_qemu: bool) -> Rehearsal:
    """One of a migration in which each kind of work takes as long as is said above."""

    async def during(work: Awaitable[Any], limit: float, what: str) -> Any:
        return await work

    async def monitor(*_: object) -> object:
        return SimpleNamespace(execute=lambda command: clock.passes(QUESTION))

    host = SimpleNamespace(test=lambda *_: clock.passes(COMMAND))
    plan = SimpleNamespace(limits=Limits(), through_qemu=through_qemu)
    each = [SimpleNamespace(image="/a", target="/b", map="/b.map") for _ in range(disks)]
    m = SimpleNamespace(plan=plan, disks=each, host_a=host, host_b=host, during=during)
    monkeypatch.setattr(module, "now", lambda: clock.now)
    monkeypatch.setattr(module, "source_user", lambda _: clock.passes(START))
    monkeypatch.setattr(module, "sync", lambda *_: clock.passes(SYNC))
    monkeypatch.setattr(module, "monitor_of_overlay", monitor)
    return Rehearsal(cast(Migration, m))


@pytest.mark.parametrize("disks", [1, 3])
@pytest.mark.parametrize("through_qemu", [False, True])
def test_each_kind_of_work_counts_as_often_as_it_is_done(
    monkeypatch: pytest.MonkeyPatch, disks: int, through_qemu: bool
) -> None:
    made = rehearsal(monkeypatch, Clock(), disks, through_qemu=through_qemu)
    assert (made.beside, made.after) == (0.0, 0.0), "nothing is known yet"
    asyncio.run(made.run())
    assert made.beside == STARTS * START * (2 if through_qemu else 1) + REMOVALS * COMMAND
    assert made.after == disks * (QUESTIONS * QUESTION + COMMAND) + SYNC


def test_one_start_that_takes_long_says_nothing_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    made = rehearsal(monkeypatch, clock, 1, through_qemu=False)
    took = iter([START * 40, *[START] * 100])
    monkeypatch.setattr(module, "source_user", lambda _: clock.passes(next(took)))
    asyncio.run(made.run())
    assert made.beside == STARTS * START + REMOVALS * COMMAND


def test_what_fails_in_a_rehearsal_is_the_failure_of_the_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    made = rehearsal(monkeypatch, Clock(), 1, through_qemu=False)

    async def fail(_: object) -> str:
        raise MigrationError("A's QEMU has ended")

    monkeypatch.setattr(module, "source_user", fail)
    with pytest.raises(MigrationError, match="A's QEMU has ended"):
        asyncio.run(made.run())
