"""What a run says when A's QEMU ends before anything has been started."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from recipes.commands.run import migrate
from recipes.errors import MigrationError
from recipes.migrate.progress import Report
from recipes.plans.plan import Destination, Export, Plan, Source
from tests.support.processes import PATIENCE
from tests.support.scripted import Peer, scripted

ANSWERS = ({"name": "vm"}, {"status": "running", "running": True})


@pytest.mark.parametrize("answered", range(len(ANSWERS) + 1))
def test_the_end_of_a_during_the_checks_tells_what_became_of_the_guest(tmp_path: Path, answered: int) -> None:
    async def talk(peer: Peer) -> None:
        await peer.greet()
        for value in ANSWERS[:answered]:
            await peer.answer(**{"return": value})
        await peer.command()
        peer.hang_up()

    async def body() -> None:
        monitor = tmp_path / "a.qmp"
        plan = Plan(
            Source(qmp=str(monitor), image="/no.raw"),
            Export(uri="nbd+unix:///vm?socket=/no.nbd"),
            Destination(qemu=("qemu",), image="/no.img", qmp="/no.b", migration="unix:/no"),
        )
        async with asyncio.timeout(10.0 * PATIENCE), scripted(monitor, talk):
            with pytest.raises(
                MigrationError,
                match=r"^A's QEMU has ended before anything was started, and with it the guest; "
                r"its disk is untouched$",
            ):
                await migrate(plan, Report(), base=tmp_path / "journals")

    asyncio.run(body())
