"""What ``resume`` is told counts wherever the migration has come to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes.commands import resume as command
from recipes.migrate.decide import Action
from recipes.migrate.progress import Report
from recipes.plans.plan import Plan
from tests.support.journals import begun


@pytest.mark.parametrize("verify", [True, False])
def test_whether_it_compares_counts_also_where_the_migration_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    kept = begun(tmp_path, "/a")
    assert kept.state
    plans: list[Plan] = []

    async def decided(_: object) -> SimpleNamespace:
        return SimpleNamespace(action=Action.START_OVER, where="on A")

    @asynccontextmanager
    async def taken_up(*_: object) -> AsyncIterator[SimpleNamespace]:
        m = SimpleNamespace(journal=SimpleNamespace(unwritten=""))
        yield SimpleNamespace(state=kept.state, m=m, decide=decided)

    async def start_over(_name: str, plan: Plan, *_: object) -> None:
        plans.append(plan)

    monkeypatch.setattr(command, "taken_up", taken_up)
    monkeypatch.setattr(command, "start_over", start_over)
    asyncio.run(command.resume("vm", Report(), verify=verify))
    assert [plan.verifies for plan in plans] == [verify]
    kept.close()
