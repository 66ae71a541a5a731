"""One migration while it runs: what the steps share, and waits that end when anything they need dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.places import place_of
from recipes.migrate.guard import Guard
from recipes.migrate.report import Report
from recipes.plans.plan import Plan
from recipes.processes.children import Child, Children
from recipes.qemu.vm import RefusedGuestError, Vm, VmGoneError

T = TypeVar("T")

LAST_WORDS = 5.0
"""Seconds in which a process whose monitor hung up says how it ended."""

LAST_WORD_OF_LOAD = 1.0
"""Seconds in which B's QEMU, which could not load the guest, says why; the guest may wait meanwhile."""

READY = "READY"

FINISH = "nbd-migrate finish PLAN.toml"
"""What the operator is told to type where the plan's file is not known."""


class AdvisedError(MigrationError):
    """A step failed, and the message says already where the guest is, and what to do."""


@dataclass(frozen=True)
class Arrival:
    """What the source's QEMU says of a migration that is complete: milliseconds, and bytes sent."""

    downtime_ms: int
    total_ms: int
    ram_bytes: int


@dataclass(frozen=True)
class GuestEnd:
    """The end of B's QEMU.

    reason  in QEMU's words (ShutdownCause); empty when it died, or when nobody heard them
    how     in ours
    good    it closed its disk and had not failed
    """

    reason: str
    how: str
    good: bool


class Migration:
    """The hosts, monitors and processes of one migration.

    a        the monitor of the source's QEMU; b: the destination's, from step 3 on
    size     of the disk in bytes
    owned    the processes end with this one in any case: they are never released
    server   nbdserve on A; fence: recipes.qemu.fence on A; qemu: the QEMU on B
    migrating  A's QEMU has taken our command to migrate; continued: and that to switch over
    overlay  nbd-overlay on B, with its monitor, where that is the engine
    unattended  the disk is completed without its guest
    guest_end  how B's QEMU has ended after the cut-over, when it was noticed
    removal  the command for B that removes what this migration has made there; none where it is nothing
    arrival  what the source said of the RAM's migration, when it is complete
    complete every block is on B, on stable storage: nothing on A is needed
    finish   the command that does what is left when the guest is on B, as the operator types it
    window   seconds from then until nothing on A was needed any more
    arrived  when the guest began to run on B (monotonic clock in seconds), None while it belongs to A
    """

    def __init__(
        self,
        plan: Plan,
        hosts: tuple[Host, Host],
        report: Report,
        children: Children,
        guard: Guard | None,
        a: Vm,
        size: int,
        *,
        owned: bool,
        finish: str = FINISH,
    ) -> None:
        self.plan = plan
        self.report = report
        self.children = children
        self.finish = finish
        self.a = a
        self.b: Vm | None = None
        self.guest_end: GuestEnd | None = None
        self.size = size
        self.owned = owned
        self.host_a, self.host_b = hosts
        self.server: Child | None = None
        self.fence: Child | None = None
        self.qemu: Child | None = None
        self.overlay: Child | None = None
        self.overlay_monitor: Vm | None = None
        self.removal: tuple[str, ...] = ()
        self.complete = self.unattended = False
        self.migrating = self.continued = False
        self.arrived: float | None = None
        self.arrival: Arrival | None = None
        self.recoveries = 0
        self.window = 0.0
        self._places: dict[tuple[Host, str], Path] = {}
        self._needed: dict[str, asyncio.Task[str]] = {}
        self._guard = guard
        if guard:
            self.need("the guard", guard.wait())
        self.need("A's QEMU", gone(a))

    @property
    def guard(self) -> Guard:
        """The guard, which there is as long as the guest may go back to A."""
        assert self._guard is not None
        return self._guard

    @property
    def monitor_b(self) -> Vm:
        """The destination's QEMU, which there is from step 3 on."""
        assert self.b is not None
        return self.b

    @property
    def has_guest(self) -> bool:
        """Whether B's QEMU lives, as far as is known."""
        if self.qemu:
            return self.qemu.running
        return self.b is not None and self.b.connected

    async def guest_has_ended(self) -> bool:
        """Whether B's QEMU has ended; then guest_end says how. Where it has, waits until that is sure."""
        b = self.b
        if b is None or (self.has_guest and b.connected):
            return self.guest_end is not None
        # Of a good end it tells before it hangs up, and it hangs up before it is gone.
        with suppress(TimeoutError):
            async with asyncio.timeout(self.plan.limits.stop):
                await b.gone()
                how = await self.qemu.wait() if self.qemu else "has ended"
                # An event may be lost with the connection; its exit code is 0 only after a good end.
                good = b.shut_down is not None or (self.qemu is not None and self.qemu.status == 0)
                self.guest_end = GuestEnd(b.shut_down or "", f"B's QEMU {how}", good)
        return self.guest_end is not None

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
        base = await self.place(host, image, suffix)
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

    async def adopt(self, name: str, host: Host, image: str, suffix: str) -> Child | None:
        """A process of this name that start() has started in an earlier run; None if it lives no more."""
        base = await self.place(host, image, suffix)
        return await self.children.adopt(name, host, base.with_name(f"{base.name}.pid"))

    async def place(self, host: Host, image: str, suffix: str) -> Path:
        """Where the log of what belongs to an image is, and its pid file, without ``.log`` and ``.pid``.

        Its host is asked once.
        """
        if (host, image) not in self._places:
            directory = self.plan.log.directory or await place_of(host, image, self.plan.limits.command)
            self._places[host, image] = Path(directory)
        return self._places[host, image] / f"{Path(image).name}.{suffix}"

    def release(self) -> None:
        """The children carry the guest, or may in a moment: from now on they live on when we end.

        Raises MigrationError for one whose keeper is dead, when the others are released.
        """
        if self.owned:
            return
        bound = [each.name for each in self._living() if not each.release()]
        if bound:
            raise MigrationError(f"{' and '.join(bound)} ended, as its keeper was killed")

    async def release_for_sure(self) -> None:
        """The same, and wait until each keeper has said so; MigrationError when one does not, or is alone."""
        if self.owned:
            return
        children = self._living()
        for each in children:
            # Where that fails, the reason is about to be known: the process has ended, or its keeper alone.
            each.release()
        for each in children:
            await each.released_for_sure()

    def _living(self) -> list[Child]:
        """The children that are there."""
        children = (self.server, self.fence, self.qemu, self.overlay)
        return [each for each in children if each and each.running]

    async def close(self) -> None:
        """Stop watching, and leave the monitors to others."""
        for name in list(self._needed):
            self.no_longer_need(name)
        for monitor in (self.a, self.b, self.overlay_monitor):
            if monitor:
                await monitor.disconnect()


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
