"""What a QEMU's monitor does, in the words of a migration."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from nbdserve.common.errors import ConnectError
from recipes.qemu.vm import CommandError, VmGoneError, VmSilentError, connect, nobody_listens
from recipes.steps.preflight import answers
from tests.support.processes import PATIENCE
from tests.support.scripted import Peer, full, scripted

LIMIT = 10.0 * PATIENCE


def test_refusals_silence_and_the_end_are_failures_of_the_migration(tmp_path: Path) -> None:
    async def talk(peer: Peer) -> None:
        await peer.greet()
        await peer.answer(error={"class": "GenericError", "desc": "not now"})
        await peer.answer()
        await peer.command()
        peer.send({"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-shutdown"}})
        await peer.command()
        peer.hang_up()

    async def body() -> None:
        path = tmp_path / "monitor"
        async with asyncio.timeout(LIMIT), scripted(path, talk):
            vm = await connect("A's QEMU", str(path), limit=LIMIT, command_limit=LIMIT)
            with pytest.raises(CommandError, match=r"^A's QEMU refused stop: not now$") as refused:
                await vm.execute("stop")
            assert refused.value.reason == "not now"
            with pytest.raises(VmSilentError, match=r"^A's QEMU answered stop with what is no reply"):
                await vm.execute("stop")
            with pytest.raises(VmSilentError, match=r"^A's QEMU did not answer stop within 0\.05 s$"):
                await vm.execute("stop", limit=0.05)
            with vm.events("STOP") as news:
                with pytest.raises(VmSilentError, match=r"^A's QEMU: a stop did not happen within 0\.05 s$"):
                    await vm.next_event(news, 0.05, "a stop")
                with pytest.raises(VmGoneError, match=r"^A's QEMU has ended$"):
                    await vm.execute("quit")
                with pytest.raises(VmGoneError, match=r"^A's QEMU has ended$"):
                    await vm.next_event(news, LIMIT, "a stop")
            await vm.gone()
            assert not vm.connected
            assert vm.shut_down == "guest-shutdown"
            await vm.disconnect()

    asyncio.run(body())


def test_a_monitor_whose_queue_is_full_is_said_to_be_and_is_somebody(tmp_path: Path) -> None:
    path = tmp_path / "monitor"
    waiting = full(path)
    try:
        with pytest.raises(ConnectError, match=r"lets nobody in within 0\.05 s, as others wait") as refused:
            asyncio.run(connect("A's QEMU", str(path), limit=0.05, command_limit=LIMIT))
        assert not nobody_listens(refused.value)
        assert asyncio.run(answers(str(path), 0.05))
    finally:
        for each in waiting:
            each.close()


def test_a_monitor_that_says_nothing_is_somebody(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "monitor"))
        listening.listen()
        assert asyncio.run(answers(str(tmp_path / "monitor"), 0.05))
    assert not asyncio.run(answers(str(tmp_path / "monitor"), 0.05))
