"""The certificates of one migration in real QEMUs, without a guest: both ends verified, and nothing left."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdserve.common import clock
from recipes.certificates.authority import Issued, issue
from recipes.certificates.placing import files_of, place, remove
from recipes.hosts.host import Host
from recipes.qemu.credentials import (
    ID,
    Parameters,
    drop_credentials,
    parameters_of,
    use_credentials,
    wanted_back,
)
from recipes.qemu.vm import CommandError, Vm, connect
from tests.support.processes import Process, listens
from tests.support.servers import free_tcp_address

HERE = Host("this host")
SECONDS = 120.0
"""For anything, on a busy machine."""


@dataclass(frozen=True)
class Pair:
    """Two QEMUs that have nothing but a monitor."""

    directory: Path
    issued: Issued

    def monitor(self, name: str) -> Path:
        """The monitor's socket of ``a`` or ``b``."""
        return self.directory / f"{name}.qmp"

    async def connected(self, name: str) -> Vm:
        """A connection to it."""
        return await connect(name, str(self.monitor(name)), limit=SECONDS, command_limit=SECONDS)

    async def placed(self, name: str, issued: Issued | None = None) -> str:
        """The directory of its certificates."""
        made, where = issued or self.issued, str(self.directory / f"{name}.tls")
        await place(HERE, where, files_of(made.authority, getattr(made, name)), "", SECONDS)
        return where


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """One waits for the other."""
    made = Pair(tmp_path, issue(["127.0.0.1"], ["localhost", "127.0.0.2"]))
    qemu = ("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none")

    def start(name: str, *more: str) -> Process:
        monitor = f"unix:{made.monitor(name)},server=on,wait=off"
        return Process([*qemu, "-qmp", monitor, *more], tmp_path / f"{name}.log")

    with start("a") as a, start("b", "-incoming", "defer") as b:
        a.wait_for(lambda: listens(made.monitor("a")), "its monitor", SECONDS)
        b.wait_for(lambda: listens(made.monitor("b")), "its monitor", SECONDS)
        yield made


async def ends(vm: Vm) -> str:
    """How the migration of a source ends."""
    while True:
        status = str((await vm.execute("query-migrate")).get("status", ""))
        if status in ("completed", "failed", "cancelled"):
            return status
        await asyncio.sleep(0.05)


async def migrate(pair: Pair, hostname: str, issued_a: Issued | None = None, *rogues: bytes) -> str:
    """Let one migrate to the other; how that ends. ``rogues`` are what strangers say to it before."""
    a, b = await pair.connected("a"), await pair.connected("b")
    port = free_tcp_address().port
    try:
        await use_credentials(b, "server", await pair.placed("b"))
        await b.execute("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
        for words in rogues:
            # Who stays, and says nothing, keeps QEMU (7.2) waiting: it reads its first message blocking.
            with socket.create_connection(("127.0.0.1", port), SECONDS) as stranger:
                stranger.sendall(words)
                await asyncio.sleep(0.1)
        await use_credentials(a, "client", await pair.placed("a", issued_a), hostname)
        await a.execute("migrate", uri=f"tcp:127.0.0.1:{port}")
        async with asyncio.timeout(SECONDS):
            return await ends(a)
    finally:
        await a.disconnect()
        await b.disconnect()


@pytest.mark.parametrize("hostname", ["localhost", "127.0.0.2"])
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_a_source_and_a_destination_that_know_each_other_migrate(pair: Pair, hostname: str) -> None:
    assert clock.run(migrate(pair, hostname)) == "completed"


def test_a_source_sends_nothing_to_who_is_not_the_host_that_it_expects(pair: Pair) -> None:
    assert clock.run(migrate(pair, "127.0.0.3")) == "failed"


@pytest.mark.representative
def test_a_destination_takes_nothing_from_a_source_of_another_migration(pair: Pair) -> None:
    assert clock.run(migrate(pair, "localhost", issue(["127.0.0.1"], ["localhost"]))) == "failed"


def test_strangers_at_the_destination_stop_nobody(pair: Pair) -> None:
    assert clock.run(migrate(pair, "localhost", None, b"", b"QEVM\0\0\0\3", b"\x16\x03\x01")) == "completed"


def test_everything_is_as_before_when_the_credentials_are_dropped(pair: Pair) -> None:
    async def body() -> None:
        a = await pair.connected("a")
        before = await parameters_of(a)
        assert before == Parameters()
        await drop_credentials(a, before)
        for _ in range(2):
            await use_credentials(a, "client", await pair.placed("a"), "localhost")
            assert await parameters_of(a) == Parameters(ID, "localhost")
        # Who comes after one that was killed does not take its rest for the operator's.
        assert await wanted_back(a) == before
        await drop_credentials(a, await wanted_back(a))
        assert await parameters_of(a) == before
        with pytest.raises(CommandError):
            await a.execute("object-del", id=ID)
        await remove(HERE, str(pair.directory / "a.tls"), SECONDS)
        with pytest.raises(CommandError, match=r"refused object-add"):
            await use_credentials(a, "client", str(pair.directory / "a.tls"), "localhost")
        await a.disconnect()

    clock.run(body())
