"""One migration while it runs: what the steps share, and waits that end when anything they need dies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.places import Places
from recipes.migrate.guard import Guard
from recipes.migrate.journal import Journal
from recipes.migrate.progress import Report
from recipes.migrate.state import OVER, PER_DISK, Phase, Process, Role, State, called
from recipes.plans.disks import PlannedDisk
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
    """One migration while it runs: its journal, and the hosts, monitors and processes that it has.

    What it has come to is ``state``, which only ``enter`` and ``record`` change. The rest can be found again.

    a, b       the monitors of the two QEMUs; b from step 3 on
    owned      the processes end with this one in any case: they are never released
    overlay_monitors  those of nbd-overlay, by the drives of their disks, where that is the engine
    unattended the disk is completed without its guest
    guest_end  how B's QEMU has ended after the cut-over, when it was noticed
    cleared    everything is done that there is to do, whatever has become of the guest
    """

    def __init__(
        self,
        journal: Journal,
        hosts: tuple[Host, Host],
        report: Report,
        children: Children,
        guard: Guard | None,
        a: Vm,
        *,
        owned: bool,
    ) -> None:
        self.journal = journal
        self.report = report
        self.children = children
        self.a = a
        self.b: Vm | None = None
        self.guest_end: GuestEnd | None = None
        self.owned = owned
        self.host_a, self.host_b = hosts
        self.here = Host("this host")
        self.overlay_monitors: dict[str, Vm] = {}
        self.unattended = self.cleared = False
        self._started: dict[tuple[Role, str], Child] = {}
        images = [disk.image for disk in self.disks], [disk.target for disk in self.disks]
        known = {(self.host_b, each.target): each.directory for each in self.disks if each.on_device}
        self._places = Places(self.plan.log.directory, images, self.plan.limits.command, known)
        self._needed: dict[str, asyncio.Task[str]] = {}
        self._guard = guard
        if guard:
            self.need("the guard", guard.wait())
        self.need("A's QEMU", a.ended())

    @property
    def state(self) -> State:
        """Return what the migration has come to."""
        assert self.journal.state is not None
        return self.journal.state

    @property
    def plan(self) -> Plan:
        """Return what is migrated, from where to where."""
        return self.state.plan

    @property
    def disks(self) -> tuple[PlannedDisk, ...]:
        """Return the guest's disks, at least one."""
        return self.plan.disks

    @property
    def pending(self) -> tuple[PlannedDisk, ...]:
        """Return the disks that still need A."""
        return self.state.pending

    @property
    def size(self) -> int:
        """Return the size of all disks together in bytes."""
        return sum(disk.size for disk in self.state.disks)

    def about(self, disk: PlannedDisk) -> str:
        """Return what sets a disk apart from others in a message; nothing where it is the only one."""
        return f" of {disk.drive}" if len(self.disks) > 1 else ""

    @property
    def finish(self) -> str:
        """Return what the operator types to do what is left when the guest is on B."""
        return self.state.finish

    @property
    def complete(self) -> bool:
        """Tell whether every block is on B, on stable storage: nothing on A is needed."""
        return self.state.complete

    @property
    def arrived(self) -> bool:
        """Tell whether the guest is B's."""
        return self.state.arrived > 0

    @property
    def since_arrival(self) -> float:
        """Return seconds since the guest became B's; 0 before."""
        return max(0.0, time.time() - self.state.arrived) if self.arrived else 0.0

    def enter(self, phase: Phase, *, sync: bool = True, **changes: Any) -> None:
        """Write down what is done next, and what has changed, before it is done.

        Without ``sync`` nobody waits for the disk: a power failure may take it, but no death of ours.

        Raises MigrationError where that fails while the guest can still go back to A; later it is only told,
        as the disk has to follow the guest in any case.
        """
        self._write(replace(self.state, phase=phase, **changes), sync=sync)

    def record(self, **changes: Any) -> None:
        """Write down what has changed; raises as ``enter`` does."""
        self._write(replace(self.state, **changes))

    def _write(self, state: State, *, sync: bool = True) -> None:
        try:
            self.journal.append(state, sync=sync)
        except OSError as error:
            told = f"{self.journal.directory}: {error.strerror}"
            self.journal.remember(state, told)
            if not self.arrived and state.phase not in (Phase.TAKING_BACK, *OVER):
                remedy = "make room there, or set XDG_STATE_HOME to another directory"
                raise MigrationError(f"{told}: {remedy}") from error
            self.report.note(f"the journal cannot be written: {told}")

    def child(self, role: Role, drive: str = "") -> Child | None:
        """Return the process in a role, if one was started or taken over."""
        return self._started.get((role, drive))

    def called(self, role: Role, drive: str = "") -> str:
        """Return what messages call the process in a role."""
        return called(role, self.plan, drive)

    def roles(self, *roles: Role) -> list[tuple[Role, str]]:
        """Return these roles, each with the drive of a disk where there is one process for each."""
        drives = [disk.drive for disk in self.disks]
        return [(role, drive) for role in roles for drive in (drives if role in PER_DISK else [""])]

    @property
    def server(self) -> Child | None:
        """Return nbdserve on A."""
        return self.child(Role.SERVER)

    @property
    def fence(self) -> Child | None:
        """Return recipes.fencing.fence on A."""
        return self.child(Role.FENCE)

    def overlay(self, disk: PlannedDisk) -> Child | None:
        """Return nbd-overlay on B for a disk."""
        return self.child(Role.OVERLAY, disk.drive)

    @property
    def qemu(self) -> Child | None:
        """Return the QEMU on B, where this command, or the one before it, has started it."""
        return self.child(Role.QEMU)

    @property
    def guard(self) -> Guard:
        """Return the guard, which there is as long as the guest may go back to A."""
        assert self._guard is not None
        return self._guard

    @property
    def monitor_b(self) -> Vm:
        """Return the destination's QEMU, which there is from step 3 on."""
        assert self.b is not None
        return self.b

    @property
    def has_guest(self) -> bool:
        """Tell whether B's QEMU lives, as far as is known."""
        if self.qemu:
            return self.qemu.running
        return self.b is not None and self.b.connected

    async def guest_has_ended(self) -> bool:
        """Tell whether B's QEMU has ended; then guest_end says how.

        Where it has, waits until that is sure.
        """
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
        """Return why a step failed. A process says more about its end than its monitor does, but a moment
        later.
        """
        limit = LAST_WORDS if isinstance(error, VmGoneError) else LAST_WORD_OF_LOAD
        if isinstance(error, VmGoneError | RefusedGuestError) and self._needed:
            await asyncio.wait(self._needed.values(), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            return next(self._ends(), str(error))
        return str(error)

    def _ends(self) -> Iterator[str]:
        """Return what was needed and has ended, and how."""
        return (f"{name} {end.result()}" for name, end in self._needed.items() if end.done())

    async def start(self, role: Role, argv: list[str], *, ready: bool = False, drive: str = "") -> Child:
        """Start a process whose log lies in the plan's log directory, or else where places.py says.

        With ``ready``, ``READY`` in the command line stands for the file that it makes when it is ready.
        ``drive`` is that of its disk, where there is one process for each.
        """
        child = await self.run(self.called(role, drive), role, argv, ready=ready, drive=drive)
        self._started[role, drive] = child
        process = Process(role, child.pid, child.mark, drive)
        self.record(processes=self.state.with_process(process).processes)
        return child

    async def run(
        self, name: str, role: Role, argv: list[str], *, ready: bool = False, drive: str = ""
    ) -> Child:
        """Start a process as ``start`` does, under another name, without keeping it."""
        host, base = self.host_of(role), await self._base(role, drive)
        ready_file = base.with_name(f"{base.name}.pid") if ready else None
        words = [str(ready_file) if word == READY else word for word in argv]
        log = base.with_name(f"{base.name}.log")
        if not self.arrived and self._guard:
            share = self._guard.share
            child = await self.children.start(name, host, log, words, ready=ready_file, share=share)
            self._guard.know(child)
            return child
        # From its first instant on it must not end with us.
        released = not self.owned
        return await self.children.start(name, host, log, words, ready=ready_file, released=released)

    async def adopt(self, role: Role, drive: str = "") -> Child | None:
        """Take over a process that an earlier command has started; None if it lives no more."""
        host, base = self.host_of(role), await self._base(role, drive)
        name = self.called(role, drive)
        pid_file, limit = base.with_name(f"{base.name}.pid"), self.plan.limits.command
        child = await self.children.adopt(name, host, pid_file, limit)
        if child is not None:
            self._started[role, drive] = child
        return child

    async def adopt_known(self, role: Role, drive: str = "") -> Child | None:
        """Take over the process that is written down, and no other; None if it lives no more."""
        known = self.state.process(role, drive)
        if known is None:
            return None
        host, base = self.host_of(role), await self._base(role, drive)
        log, name = base.with_name(f"{base.name}.log"), self.called(role, drive)
        limit = self.plan.limits.command
        child = await self.children.adopt_process(name, host, known.pid, known.mark, log, limit)
        if child is not None:
            self._started[role, drive] = child
        return child

    def host_of(self, role: Role) -> Host:
        """Return the host of a process."""
        if role is Role.TUNNEL:
            return self.here
        return self.host_a if role in (Role.SERVER, Role.FENCE) else self.host_b

    async def _base(self, role: Role, drive: str) -> Path:
        """What is there for all disks has its place beside the first one; the tunnel's is on neither host."""
        if role is Role.TUNNEL:
            return Path(self.journal.directory, role.value)
        disk = next((each for each in self.disks if each.drive == drive), self.disks[0])
        image = disk.image if role in (Role.SERVER, Role.FENCE) else disk.target
        return await self.place(self.host_of(role), image, role.value)

    async def place(self, host: Host, image: str, suffix: str) -> Path:
        """Return where log and pid file of what belongs to an image are, without ``.log`` and ``.pid``."""
        return await self._places.place(host, image, suffix)

    def release(self) -> None:
        """The children carry the guest, or may in a moment: from now on they live on when we end.

        Raises MigrationError for one whose supervisor is dead, when the others are released.
        """
        if self.owned:
            return
        bound = [each.name for each in self._living() if not each.release()]
        if bound:
            raise MigrationError(f"{' and '.join(bound)} ended, as its supervisor was killed")

    async def release_for_sure(self) -> None:
        """The same, and wait until each supervisor has said so; MigrationError when one does not."""
        if self.owned:
            return
        children = self._living()
        for each in children:
            # Where that fails, the reason is about to be known: the process has ended, or its supervisor.
            each.release()
        for each in children:
            await each.released_for_sure()

    def done(self) -> None:
        """Write down that nothing is left to be done; what lives on does so without a supervisor."""
        if not self.owned:
            for each in self._living():
                each.leave()
        self.enter(Phase.DONE, made=(), processes=(), tracking=None)

    def _living(self) -> list[Child]:
        """Return the children that are there."""
        return [each for each in self._started.values() if each.running]

    async def close(self) -> None:
        """Stop watching, and leave the monitors to others."""
        for name in list(self._needed):
            self.no_longer_need(name)
        for monitor in (self.a, self.b, *self.overlay_monitors.values()):
            if monitor:
                await monitor.disconnect()
