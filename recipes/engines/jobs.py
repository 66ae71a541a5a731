"""The block jobs that stream the disks, one for each, on one monitor or on several."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from nbdserve.common.clock import now
from nbdserve.qmp.client import EventListener
from recipes.engines.choice import engine_for
from recipes.engines.overlay_engine import monitor_of_overlay
from recipes.migrate.progress import Progress
from recipes.migrate.runtime import Migration
from recipes.plans.disks import PlannedDisk
from recipes.qemu.vm import CommandError, Vm, VmSilentError

EVENTS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR", "BLOCK_IO_ERROR")


class Stillness:
    """Since when something does not move."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        """``clock`` is what stillness is measured by; by default the one that never stops."""
        self._clock = clock or time.monotonic
        self._moved, self._seen = self._clock(), 0

    def note(self, done: int) -> None:
        """Note how many bytes are done now."""
        if done != self._seen:
            self._moved, self._seen = self._clock(), done

    def restart(self) -> None:
        """Nothing has to move now."""
        self._moved = self._clock()

    @property
    def seconds(self) -> float:
        """Return seconds without any movement."""
        return self._clock() - self._moved


class Job:
    """The block job of one disk.

    name   the job's
    device what block-stream is told
    vm     the monitor that it is told to: B's QEMU, or the disk's nbd-overlay
    done   every block of the disk is local
    """

    def __init__(self, m: Migration, disk: PlannedDisk, vm: Vm) -> None:
        self.disk = disk
        self.name, self.device = engine_for(m).streamed(m.plan, disk)
        self.vm = vm
        self.done = m.state.disk(disk).complete
        self.still = Stillness(now)
        self.offset, self.length = 0, m.state.disk(disk).size
        self.ready = False
        """Everything is local, and only the guest is waited for."""
        self.verified = 0

    @property
    def bytes_done(self) -> int:
        """Return how many bytes are local, as far as was told."""
        return self.length if self.done else min(self.offset, self.length)

    @property
    def bytes_missing(self) -> int:
        """Return how many are not."""
        return self.length - self.bytes_done

    def note(self, info: Mapping[str, Any]) -> None:
        """Note how far it is, by what query-block-jobs says."""
        self.offset, self.length = info["offset"], info["len"]
        self.ready = bool(info.get("ready"))
        self.verified = info.get("x-verified", 0)
        self.still.note(self.offset + self.verified)


class Jobs:
    """Those of a migration, in the order of its disks."""

    def __init__(self, m: Migration) -> None:
        self._m = m
        self.all: list[Job] = []
        self.speed = m.plan.limits.speed
        """Of all of them together, in bytes per second; 0 is no limit."""
        # A monitor can be blocked while a node waits for its connection.
        self.patience = m.plan.limits.command + m.plan.limits.reconnect_delay
        self._most = 0

    async def find(self, *, arrived: bool = True) -> None:
        """Connect to the monitor of each disk that is not complete, or whose nbd-overlay a guest needs.

        Unless the guest has ``arrived`` nobody is told that it has.
        """
        engine = engine_for(self._m)
        if not arrived:
            self.all = [Job(self._m, disk, await monitor_of_overlay(self._m, disk)) for disk in self._m.disks]
            return
        for disk in self._m.disks:
            if disk in self._m.pending or await engine.carries(self._m, disk):
                self.all.append(Job(self._m, disk, await engine.monitor(self._m, disk)))

    @property
    def running(self) -> list[Job]:
        """Return those that have not come to their end."""
        return [job for job in self.all if not job.done]

    @property
    def monitors(self) -> list[Vm]:
        """Return the monitors that they are on, each once."""
        return list(dict.fromkeys(job.vm for job in self.all))

    def called(self, vm: Vm, name: object) -> Job | None:
        """Return the job of this name on a monitor."""
        return next((job for job in self.all if job.vm is vm and job.name == name), None)

    def of_device(self, vm: Vm, name: object) -> Job | None:
        """Return the job that an event is about which names a job, or a node that a device refers to."""
        ours = (job for job in self.all if job.vm is vm and name in (job.name, job.disk.drive))
        return next(ours, None)

    async def execute(self, vm: Vm, command: str, given: Mapping[str, object] | None = None) -> Any:
        """Execute a command on a monitor."""
        work = vm.call(command, given or {}, limit=self.patience)
        return await self._m.during(work, self.patience * 2, command)

    async def query(self, job: Job) -> dict[str, Any] | None:
        """Return what the monitor says of a job, or None when it has ended."""
        jobs: list[dict[str, Any]] = await self.execute(job.vm, "query-block-jobs")
        return next((each for each in jobs if each["device"] == job.name), None)

    async def start(self) -> list[Job]:
        """Start those that are not there, each with its share of the speed; return those that were there."""
        older = []
        for job in self.running:
            if await self.query(job) is not None:
                older.append(job)
                continue
            given = {"job-id": job.name, "device": job.device, "speed": self.share, "on-error": "stop"}
            await self.execute(job.vm, "block-stream", given)
        if older:
            await self.share_speed()
        return older

    @property
    def share(self) -> int:
        """Return the speed of each of those that run, in bytes per second; 0 is no limit."""
        return max(1, self.speed // max(1, len(self.running))) if self.speed else 0

    async def share_speed(self) -> None:
        """Divide the speed among those that run."""
        for job in self.running:
            # It may have come to its end.
            with suppress(CommandError):
                given = {"device": job.name, "speed": self.share}
                await self.execute(job.vm, "block-job-set-speed", given)

    @property
    def missing(self) -> int:
        """Return how many bytes are to come, as far as was told."""
        return sum(job.bytes_missing for job in self.running)

    async def waiting(self) -> list[Job]:
        """Return those that an error has paused."""
        found = []
        for job in self.running:
            info = await self.query(job)
            if info is not None and info["status"] == "paused":
                found.append(job)
        return found

    async def look(self) -> Progress:
        """Look how far they are; of all disks together this is never less than before."""
        for job in self.running:
            if (info := await self.query(job)) is not None:
                job.note(info)
        known = {job.disk.drive for job in self.all}
        whole = sum(self._m.state.disk(disk).size for disk in self._m.disks if disk.drive not in known)
        self._most = max(self._most, whole + sum(job.bytes_done for job in self.all))
        total = max(self._most, whole + sum(job.length for job in self.all))
        verified = sum(job.verified for job in self.all)
        return Progress(self._most, total, 0.0, self._m.since_arrival, verified=verified)


class News:
    """What the monitors tell of the jobs and the disks, whichever says it first."""

    def __init__(self, listeners: Mapping[Vm, EventListener]) -> None:
        self._listeners = listeners

    async def next(self, seconds: float, *others: asyncio.Task[None]) -> list[tuple[Vm, dict[str, Any]]]:
        """Return what is told within so many seconds, or until one of the ``others`` is done.

        Raises VmGoneError when one of the monitors has hung up.
        """
        waits = {
            asyncio.ensure_future(vm.next_event(listener, seconds, "an event")): vm
            for vm, listener in self._listeners.items()
        }
        try:
            await asyncio.wait({*waits, *others}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            # One that is cancelled takes no event with it.
            ends = await asyncio.gather(*waits, return_exceptions=True)
        told = [(vm, end) for vm, end in zip(waits.values(), ends, strict=True) if isinstance(end, dict)]
        for end in ends:
            quiet = isinstance(end, dict | VmSilentError | asyncio.CancelledError)
            if isinstance(end, BaseException) and not quiet and not told:
                raise end
        return told


@contextmanager
def heard(monitors: list[Vm]) -> Iterator[News]:
    """Listen to these monitors."""
    with ExitStack() as stack:
        yield News({vm: stack.enter_context(vm.events(*EVENTS)) for vm in monitors})
