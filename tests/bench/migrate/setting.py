"""What every contender is given: two hosts, a guest that works on A, and where to put its disk on B."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from nbdserve.common.errors import ConnectError
from nbdserve.qmp.client import EventListener
from recipes.qemu.vm import Vm, connect, nobody_listens
from tests.bench.migrate.guest import NODE, Guest, Listener
from tests.bench.migrate.hosts import ADDRESSES, RAM_PORT, Hosts
from tests.support.processes import Process
from tests.support.servers import fresh_path

PATIENCE = 3600.0
"""Seconds after which a migration that does not end is given up."""

ANSWER = 30.0
"""Seconds for a monitor's answer."""


class MoveError(RuntimeError):
    """A contender could not move the guest."""


@dataclass(frozen=True)
class Setting:
    """A guest that is to be moved.

    directory  where the disks lie
    image      A's, of ``size`` bytes
    heard      what the guest tells
    stack      ends what was started, after the guest was watched for a while on B
    """

    hosts: Hosts
    guest: Guest
    directory: Path
    image: Path
    size: int
    heard: Listener
    stack: ExitStack

    def target(self, layout: str) -> Path:
        """Return B's disk."""
        return self.directory / f"b.{layout}"

    def monitor(self, host: str) -> Path:
        """Return the socket of a QEMU's monitor."""
        return self.guest.sockets / f"{host}.qmp"

    @property
    def ram(self) -> str:
        """Return where B waits for the RAM."""
        return f"tcp:{ADDRESSES['b']}:{RAM_PORT}"

    def start(self, host: str, *words: object) -> Process:
        """Start a process on a host; it ends with the setting."""
        log = fresh_path(self.guest.sockets, f"{host}-process", ".log")
        return self.stack.enter_context(Process(self.hosts.on(host, *words), log))

    def qemu(self, host: str, nodes: Sequence[Mapping[str, object]], *words: str) -> Process:
        """Start the guest's QEMU on a host, with these block nodes."""
        given = [word for node in nodes for word in ("-blockdev", json.dumps(node))]
        address = f"unix:{self.monitor(host)},server=on,wait=off"
        return self.start(host, *self.guest.qemu(host), *given, "-qmp", address, *words)


@dataclass(frozen=True)
class Moved:
    """A guest that has been moved: moments of time.monotonic.

    began        when the operator said so
    free         when nothing on A was needed any more
    ended        when all was done
    downtime_ms  how long the guest stood still, as A's QEMU says
    layout       of B's disk, as qemu-img calls it
    window       whether A is needed after the cut-over at all
    misjudged    by which part of itself the window was predicted wrongly, where one was
    """

    began: float
    free: float
    ended: float
    downtime_ms: int
    layout: str
    window: bool = True
    misjudged: float | None = None


def raw_on(path: Path) -> list[dict[str, object]]:
    """Return the nodes of a disk that is a raw file."""
    return [{"node-name": NODE, "driver": "raw", "file": {"driver": "file", "filename": str(path)}}]


@asynccontextmanager
async def monitor(setting: Setting, host: str) -> AsyncIterator[Vm]:
    """Connect to a QEMU's monitor, as soon as that is there."""
    deadline, vm = time.monotonic() + ANSWER, None
    while vm is None:
        try:
            where = str(setting.monitor(host))
            vm = await connect(f"QEMU on {host}", where, limit=ANSWER, command_limit=ANSWER)
        except ConnectError as error:
            if not nobody_listens(error) or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)
    try:
        yield vm
    finally:
        await vm.disconnect()


async def switch_on(vm: Vm, *names: str) -> None:
    """Switch capabilities of the migration on."""
    capabilities = [{"capability": name, "state": True} for name in names]
    await vm.execute("migrate-set-capabilities", capabilities=capabilities)


async def reach(vm: Vm, news: EventListener, wanted: str) -> None:
    """Wait until the migration is in this state."""
    while True:
        status = (await vm.next_event(news, PATIENCE, wanted))["status"]
        if status == wanted:
            return
        if status in ("failed", "cancelled"):
            raise MoveError(f"the migration has {status}")


async def job(vm: Vm, news: EventListener, wanted: str, limit: float = PATIENCE) -> None:
    """Wait for an event of a block job; MoveError when the job fails instead."""
    event = await vm.next_event(news, limit, wanted)
    if event["event"] != wanted or event.get("error"):
        raise MoveError(f"the job has ended: {event}")


async def arrived(setting: Setting, b: Vm) -> None:
    """Wait until the guest has had a request answered on B."""
    deadline = time.monotonic() + ANSWER
    while setting.heard.first_on("b") is None:
        if time.monotonic() > deadline:
            status = (await b.execute("query-status"))["status"]
            raise MoveError(f"the guest on B ({status}) does nothing in {ANSWER:g} s")
        await asyncio.sleep(0.005)
