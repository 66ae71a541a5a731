"""What a QEMU's monitor does, in the words of a migration."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from recipes.qemu.vm import CommandError, VmGoneError, VmSilentError, connect
from tests.support.processes import PATIENCE
from tests.support.scripted import Peer, scripted

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
