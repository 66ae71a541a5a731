"""What of the cut-over can be seen without a QEMU: who waits for whom."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from recipes.errors import MigrationError
from recipes.migrate.runtime import Migration
from recipes.precopy.rounds import Rounds
from recipes.qemu.vm import Vm, VmSilentError
from recipes.steps import cutover
from recipes.steps.cutover import arriving, last_bitmap


def parting(task: asyncio.Task[None] | None) -> Migration:
    """A migration of which only this is there."""
    return cast(Migration, SimpleNamespace(parting=task))


@pytest.mark.parametrize("failing", ["disks", "bitmap"])
def test_a_guest_with_other_disks_does_not_go_and_neither_does_one_whose_last_bitmap_was_not_read(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    done: list[str] = []

    async def look(what: str) -> dict[str, Any]:
        await asyncio.sleep(0.01 if what == failing else 0.02)
        done.append(what)
        if what == failing:
            raise MigrationError(f"{what}: no")
        return {"precopied": 1}

    monkeypatch.setattr(cutover, "check_disks", lambda *_: look("disks"))
    files = cast(Awaitable[list[str]], None)
    rounds = cast(Rounds, SimpleNamespace(finish=lambda: look("bitmap")))
    with pytest.raises(MigrationError, match=f"{failing}: no"):
        asyncio.run(cast(Any, last_bitmap(parting(None), rounds, files)))
    assert sorted(done) == ["bitmap", "disks"], "nothing goes on behind the failure"
    failing = ""
    assert asyncio.run(cast(Any, last_bitmap(parting(None), rounds, files))) == {"precopied": 1}


def test_a_guest_s_start_on_b_is_heard_of_and_not_only_looked_for() -> None:
    class B:
        """B's QEMU, whose guest comes when somebody listens."""

        status = "inmigrate"
        waited = 0

        def events(self, *names: str) -> Any:
            assert names == ("RESUME",)
            return nullcontext()

        async def execute(self, command: str) -> dict[str, str]:
            assert command == "query-status"
            return {"status": self.status}

        async def next_event(self, news: object, limit: float, what: str) -> dict[str, str]:
            self.waited += 1
            if self.waited == 1:
                raise VmSilentError("nothing")
            self.status = "running"
            return {"event": "RESUME"}

    b = B()
    asyncio.run(arriving(cast(Vm, b)))
    assert b.waited == 2
