"""What a daemon's monitor does, in the words of nbd-overlay."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdserve.qmp.client import GoneError, RefusedError
from overlay.cli.remote import NoJobError, connected
from tests.support.processes import PATIENCE
from tests.support.scripted import Peer, scripted

LIMIT = 10.0 * PATIENCE


def test_refusals_silence_and_the_end_name_the_monitor(tmp_path: Path) -> None:
    path = tmp_path / "monitor"

    async def talk(peer: Peer) -> None:
        await peer.greet()
        await peer.answer(error={"class": "GenericError", "desc": "not now"})
        await peer.answer()
        await peer.answer(**{"return": {"job": None, "phase": "idle", "complete": False}})
        await peer.command()
        await peer.command()
        peer.send({"event": "BLOCK_JOB_COMPLETED"})
        peer.hang_up()

    async def body() -> None:
        async with asyncio.timeout(LIMIT), scripted(path, talk), connected(str(path)) as remote:
            with pytest.raises(RefusedError) as refused:
                await remote.execute("quit")
            assert str(refused.value) == f"{path}: quit is refused: not now"
            with pytest.raises(GoneError) as told:
                await remote.status()
            assert (
                str(told.value) == f"{path}: the daemon answered query-overlay with what is no reply of QMP's"
            )
            with pytest.raises(NoJobError) as idle:
                await remote.job()
            assert str(idle.value) == f"{path}: nothing is being streamed: there is no job"
            with remote.events("BLOCK_JOB_COMPLETED") as listener:
                assert await remote.rest(listener, 0.05) is None
                with pytest.raises(GoneError) as silent:
                    await remote.execute("quit", limit=0.05)
                told_late = f"{path}: the daemon did not answer quit within 0.05 s; does it hang?"
                assert str(silent.value) == told_late
                with pytest.raises(GoneError) as gone:
                    await remote.execute("quit")
                assert str(gone.value) == f"{path}: the daemon has ended"
                assert await remote.rest(listener, LIMIT) == "BLOCK_JOB_COMPLETED"
                assert await remote.rest(listener, LIMIT) is None

    asyncio.run(body())
