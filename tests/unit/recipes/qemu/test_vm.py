"""Waiting for a monitor's answer."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from qemu.qmp import QMPClient, Runstate

from recipes.qemu.vm import Vm


class AnsweringClient:
    """A connected client whose one command is answered when the test says so."""

    runstate = Runstate.RUNNING

    def __init__(self) -> None:
        self.answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    async def execute(self, command: str, arguments: object) -> object:
        return await asyncio.shield(self.answer)

    async def runstate_changed(self) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("steps", range(5))
def test_a_cancellation_that_comes_together_with_the_answer_is_not_lost(steps: int) -> None:
    async def body() -> None:
        client = AnsweringClient()
        vm = Vm("A", cast(QMPClient, client), 5.0)
        task = asyncio.create_task(vm.execute("query-status"))
        await asyncio.sleep(0.01)
        client.answer.set_result({})
        # The answer travels one step of the loop at a time.
        for _ in range(steps):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(body())
