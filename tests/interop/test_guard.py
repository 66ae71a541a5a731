"""The guard and its deputy, as the orchestrator sees them: nothing that becomes of them keeps it waiting."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from recipes.migrate import guard as module
from recipes.migrate.guard import Guard, start_guard
from recipes.migrate.watch import Orders
from recipes.processes.child import Lifeline
from tests.support.journals import begun
from tests.support.vms import lives

SECONDS = 30.0


def guarded(directory: Path, body: Callable[[Guard, list[int]], Awaitable[None]]) -> list[int]:
    """Run the body with a guard, and the process ids of it and its deputy; these are returned."""
    journal = begun(directory, str(directory / "a"))
    orders = Orders(str(journal.directory), journal.fd, journal.lock.fd, owned=False)
    pids: list[int] = []

    async def main() -> None:
        guard = await start_guard(orders)
        pids.extend(child.pid for child in psutil.Process().children())
        assert len(pids) == 2
        try:
            await body(guard, pids)
        finally:
            await guard.close()

    asyncio.run(asyncio.wait_for(main(), SECONDS))
    return pids


def test_both_end_when_they_are_dismissed(tmp_path: Path) -> None:
    async def body(guard: Guard, pids: list[int]) -> None:
        assert all(lives(pid) for pid in pids)

    assert not any(lives(pid) for pid in guarded(tmp_path, body))


@pytest.mark.parametrize("index", [0, 1])
def test_the_death_of_either_is_told(tmp_path: Path, index: int) -> None:
    async def body(guard: Guard, pids: list[int]) -> None:
        os.kill(pids[index], signal.SIGKILL)
        assert await guard.wait() == "ended with status -9"

    assert not any(lives(pid) for pid in guarded(tmp_path, body))


@pytest.mark.parametrize("hanging", [(0,), (1,), (0, 1)])
def test_those_that_hang_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hanging: tuple[int, ...]
) -> None:
    monkeypatch.setattr(module, "CLOSE", 0.5)

    async def body(guard: Guard, pids: list[int]) -> None:
        for index in hanging:
            os.kill(pids[index], signal.SIGSTOP)

    assert not any(lives(pid) for pid in guarded(tmp_path, body))


def test_one_that_takes_no_messages_does_not_keep_the_migration_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SEND", 0.2)

    async def body(guard: Guard, pids: list[int]) -> None:
        os.kill(pids[0], signal.SIGSTOP)
        ends = os.pipe()
        for _ in range(1000):
            guard.share(Lifeline("x" * 1000, *ends))
        assert await guard.wait() == "ended with status -9"

    guarded(tmp_path, body)
