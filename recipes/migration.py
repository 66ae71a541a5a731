"""One migration while it runs: what the steps share, and waits that end when anything they need dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nbdserve.errors import MigrationError
from recipes.children import Child, Children
from recipes.guard import Guard
from recipes.host import Host
from recipes.places import place_of
from recipes.plan import Plan
from recipes.report import Report
from recipes.vm import RefusedGuestError, Vm, VmGoneError

if TYPE_CHECKING:
    from recipes.engines import Engine

T = TypeVar("T")

LAST_WORDS = 5.0
"""Seconds in which a process whose monitor hung up says how it ended."""

LAST_WORD_OF_LOAD = 1.0
"""Seconds in which B's QEMU, which could not load the guest, says why; the guest may wait meanwhile."""


@dataclass(frozen=True)
class Arrival:
    """What the source's QEMU says of a migration that is complete: milliseconds, and bytes sent."""

    downtime_ms: int
    total_ms: int
    ram_bytes: int


class Migration:
    """The hosts, monitors and processes of one migration.

    a        the monitor of the source's QEMU; b: the destination's, from step 3 on
    size     of the disk in bytes
    owned    the processes end with this one in any case: they are never released
    server   nbdserve on A; fence: recipes.fence on A; qemu: the QEMU on B
    migrating  A's QEMU has taken our command to migrate
    overlay  nbd-overlay on B, with its monitor, where that is the engine
    removal  the command for B that removes what this migration has made there; none where it is nothing
    arrival  what the source said of the RAM's migration, when it is complete
    complete every block is on B, on stable storage: nothing on A is needed
    arrived  when the guest began to run on B (monotonic clock in seconds), None while it belongs to A
    """

    def __init__(
        self,
        plan: Plan,
        hosts: tuple[Host, Host],
        engine: Engine,
        report: Report,
        children: Children,
        guard: Guard,
        a: Vm,
        size: int,
        *,
        owned: bool,
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.report = report
        self.children = children
        self.guard = guard
        self.a = a
        self.b: Vm | None = None
        self.size = size
        self.owned = owned
        self.host_a, self.host_b = hosts
        self.server: Child | None = None
        self.fence: Child | None = None
        self.qemu: Child | None = None
        self.overlay: Child | None = None
        self.overlay_monitor: Vm | None = None
        self.removal: tuple[str, ...] = ()
        self.complete = False
        self.migrating = False
        self.arrived: float | None = None
        self.arrival: Arrival | None = None
        self.recoveries = 0
        self._places: dict[tuple[Host, str], Path] = {}
        self._needed: dict[str, asyncio.Task[str]] = {}
        self.need("the guard", guard.wait())
        self.need("A's QEMU", gone(a))

    @property
    def monitor_b(self) -> Vm:
        """The destination's QEMU, which there is from step 3 on."""
        assert self.b is not None
        return self.b

    def need(self, name: str, end: Awaitable[str]) -> None:
        """From now on no wait outlives this process; ``end`` returns in words how it has ended."""
        self._needed[name] = asyncio.ensure_future(end)

    def no_longer_need(self, name: str) -> None:
        """This process may end from now on."""
        task = self._needed.pop(name, None)
        if task:
            task.cancel()

    async def during(self, work: Awaitable[T], limit: float, what: str) -> T:
        """Wait for ``work``, for at most ``limit`` seconds and only as long as everything needed lives.

        Raises MigrationError: whose end it was, or that ``what`` took too long.
        """
        task = asyncio.ensure_future(work)
        try:
            waits = {task, *self._needed.values()}
            await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.refuse_the_dead()
                raise MigrationError(f"{what} took longer than {limit:g} s")
            return task.result()
        finally:
            task.cancel()

    def refuse_the_dead(self) -> None:
        """Raise MigrationError when something needed has ended already."""
        for end in self._ends():
            raise MigrationError(end)

    async def explain(self, error: Exception) -> str:
        """Why a step failed. A process says more about its end than its monitor does, but a moment later."""
        limit = LAST_WORDS if isinstance(error, VmGoneError) else LAST_WORD_OF_LOAD
        if isinstance(error, VmGoneError | RefusedGuestError) and self._needed:
            await asyncio.wait(self._needed.values(), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            return next(self._ends(), str(error))
        return str(error)

    def _ends(self) -> Iterator[str]:
        """What was needed and has ended, and how."""
        return (f"{name} {end.result()}" for name, end in self._needed.items() if end.done())

    async def start(
        self, name: str, host: Host, image: str, suffix: str, argv: list[str], *, ready: bool = False
    ) -> Child:
        """Start a process whose log lies in the plan's log directory, or else where places.py says.

        With ``ready``, ``READY`` in the command line stands for the file that it makes when it is ready.
        """
        base = await self._place(host, image) / f"{Path(image).name}.{suffix}"
        ready_file = base.with_name(f"{base.name}.pid") if ready else None
        words = [str(ready_file) if word == READY else word for word in argv]
        log = base.with_name(f"{base.name}.log")
        if self.arrived is None:
            share = self.guard.share
            child = await self.children.start(name, host, log, words, ready=ready_file, share=share)
            self.guard.know(child)
            return child
        # From its first instant on it must not end with us.
        released = not self.owned
        return await self.children.start(name, host, log, words, ready=ready_file, released=released)

    def remove_later(self, *argv: str) -> None:
        """From now on this command for B removes what was made there, when the guest is given back to A."""
        self.removal = argv
        self.guard.remove_later(argv)

    async def _place(self, host: Host, image: str) -> Path:
        """Where the logs of what belongs to an image are; its host is asked once."""
        if self.plan.log.directory:
            return Path(self.plan.log.directory)
        if (host, image) not in self._places:
            found = await place_of(host, image, self.plan.limits.command)
            self._places[host, image] = Path(found)
        return self._places[host, image]

    def release(self) -> None:
        """The children carry the guest, or may in a moment: from now on they live on when we end.

        Raises MigrationError for one whose keeper is dead, when the others are released.
        """
        if self.owned:
            return
        children = [each for each in (self.server, self.fence, self.qemu, self.overlay) if each]
        bound = [each.name for each in children if each.running and not each.release()]
        if bound:
            raise MigrationError(f"{' and '.join(bound)} ended, as its keeper was killed")

    async def close(self) -> None:
        """Stop watching, and leave B's monitor to others."""
        for name in list(self._needed):
            self.no_longer_need(name)
        for monitor in (self.b, self.overlay_monitor):
            if monitor:
                await monitor.disconnect()


READY = "READY"


async def hosts(plan: Plan) -> tuple[Host, Host]:
    """Hosts A and B."""
    source, destination, limit = plan.source, plan.destination, plan.limits.command
    a, b = Host("A", source.shell, source.bin), Host("B", destination.shell, destination.bin)
    # Less than the limit of a command, so that ssh itself says what it waited for.
    return await a.prepared(limit * 2 / 3), await b.prepared(limit * 2 / 3)


async def gone(vm: Vm) -> str:
    """Wait until a QEMU that is not our child has ended."""
    await vm.gone()
    return "has ended"
