"""Step 5: copy every block that is not local yet; interruptions are in recovery.py."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

from nbdserve.common.clock import now
from nbdserve.common.errors import ConnectError
from recipes.channel import carriers
from recipes.engines.choice import engine_for
from recipes.engines.jobs import Job, Jobs, News, heard
from recipes.engines.pace import Pace
from recipes.errors import MigrationError
from recipes.hosts.quoting import listed
from recipes.hosts.stable_storage import Written, sync
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase
from recipes.plans.disks import PlannedDisk
from recipes.plans.reaching import monitor_b
from recipes.qemu.vm import Vm, VmGoneError, VmSilentError, connect_again
from recipes.steps import advice
from recipes.steps.recovery import LOOK, Recovery
from recipes.steps.without_guest import go_without_guest

SUSPICIOUS = 10.0
"""Seconds without any movement after which, and as often, it is looked whether A's disks are still there."""


async def stream(m: Migration) -> str:
    """Step 5: until every block of every disk is in its overlay, and on stable storage there."""
    return await _all_of(m, Stream(m))


async def stream_again(m: Migration) -> str:
    """Step 5 of a migration of which another command has begun that, whatever has interrupted it."""
    return await _all_of(m, Stream(m, again=True))


async def _all_of(m: Migration, first: Stream) -> str:
    m.enter(Phase.STREAM)
    try:
        compared = await first.run()
    except MigrationError:
        # A guest that has shut down needs its disks no less than before; one whose QEMU died may be started
        # again at once, on what is there.
        if not (await m.guest_has_ended() and m.guest_end and m.guest_end.good):
            raise
        await go_without_guest(m)
        compared = await Stream(m).run()
    # From here on nothing on A is needed; by the guest, nothing was while the copy was compared with it.
    whole = tuple(replace(disk, complete=True) for disk in m.state.disks)
    m.enter(Phase.COMPLETE, disks=whole, window=max(0.0, m.since_arrival - compared))
    again = f", interrupted {m.state.recoveries} times" if m.state.recoveries else ""
    return f"every block of {m.size} bytes is in {listed(disk.target for disk in m.disks)}{again}"


class Stream:
    """The block jobs on B, and the server that feeds them.

    ``again`` says that somebody has asked to go on: what has paused the jobs before was told then, and its
    cause may have gone. Else an error is one of this command's own, if it was not heard: as of a job that was
    there before the cut-over.
    """

    def __init__(self, m: Migration, *, again: bool = False) -> None:
        self._m = m
        self._limits = m.plan.limits
        self._jobs = Jobs(m)
        self._pace = Pace(m, self._jobs)
        self._recovery = Recovery(m, self._jobs)
        self._restarts = self._ways = 0
        self._again = again
        self._looked = -math.inf
        self._settling: set[asyncio.Task[None]] = set()
        self._written: dict[str, Written] = {}
        self._local = self._compared = 0.0
        """Seconds since the arrival: when every block was here, and when it had been compared."""

    async def run(self) -> float:
        """Stream to the end; return for how many seconds nothing was done but comparing with A.

        MigrationError says what to do when the end cannot be reached.
        """
        await self._jobs.find()
        self._pace.choose(self._jobs.missing)
        try:
            while True:
                try:
                    await self._stream()
                    return self._compared - self._local
                except VmGoneError as error:
                    if await self._found_way_again():
                        continue
                    for job in await self._lost(error):
                        await self._restart_overlay(job, error)
                except VmSilentError as error:
                    raise await self._recovery.advised(str(error), await self._silent(error)) from error
                except MigrationError:
                    if not await self._found_way_again():
                        raise
        finally:
            for task in self._settling:
                task.cancel()
            # What one has failed with is of no account any more.
            await asyncio.gather(*self._settling, return_exceptions=True)

    async def _found_way_again(self) -> bool:
        """Tell whether it was the connection to B that was lost, and not who is there; then it is made again.

        It carries all monitors there. The processes live on by themselves.
        """
        m, limits = self._m, self._limits
        b = m.b
        if b is None or b.connected or not m.host_b.address or self._ways >= limits.restarts:
            return False
        self._ways += 1
        where = monitor_b(m.plan, m.host_b)
        try:
            again = await connect_again("B's QEMU", where, limit=limits.recover, command_limit=limits.command)
        except ConnectError:
            return False
        if again is None:
            return False
        m.b = again
        await b.disconnect()
        m.no_longer_need("B's QEMU")
        m.need("B's QEMU", m.qemu.wait() if m.qemu else again.ended())
        m.record(recoveries=m.state.recoveries + 1)
        m.report.note("the connection to B was lost, and is there again")
        for job in self._jobs.all:
            if job.vm is b:
                job.vm = again
            elif not job.vm.connected:
                await m.overlay_monitors.pop(job.disk.drive).disconnect()
                job.vm = await engine_for(m).monitor(m, job.disk)
        return True

    async def _lost(self, error: VmGoneError) -> list[Job]:
        """Return the jobs whose nbd-overlay has died; raises the error where it is B's QEMU, or nobody."""
        vms = {*self._jobs.monitors, *([self._m.b] if self._m.b else [])}
        ends = [asyncio.ensure_future(vm.gone()) for vm in vms]
        try:
            await asyncio.wait(ends, timeout=self._limits.stop, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        lost = [job for job in self._jobs.all if not job.vm.connected]
        if not lost or (self._m.b and not self._m.b.connected):
            raise error
        return lost

    async def _silent(self, error: VmSilentError) -> str:
        """Return what to do about a monitor that does not answer."""
        for job in self._jobs.all:
            if job.vm is not self._m.b and str(error).startswith((f"{job.vm.name} ", f"{job.vm.name}:")):
                return await advice.overlay_silent(self._m, job.disk)
        return await advice.qemu_silent(self._m)

    async def _restart_overlay(self, job: Job, error: VmGoneError) -> None:
        """nbd-overlay has died: start it again, unless that was done too often or cannot be done."""
        why: MigrationError = error
        if self._restarts < self._limits.restarts:
            self._restarts += 1
            try:
                job.vm = await engine_for(self._m).monitor(self._m, job.disk)
                return
            except MigrationError as refusal:
                if await self._m.guest_has_ended():
                    raise
                why = refusal
        raise await self._recovery.advised(str(why), await advice.overlay_dead(self._m, job.disk)) from why

    async def _stream(self) -> None:
        """Start the jobs, and follow them to their ends. VmGoneError when what streams has died."""
        with heard(self._jobs.monitors) as news:
            older = await self._jobs.start()
            if await self._recovery.guest_waits() or {*older} & {*await self._jobs.waiting()}:
                # Of a job that was there before, and of a guest that waited before, nobody tells why.
                await self._recovery.recover("guest or stream were interrupted before", old=self._again)
            self._again = False
            while self._jobs.running or self._settling:
                await self._advance(await self._next(news))

    async def _next(self, news: News) -> list[tuple[Vm, dict[str, Any]]]:
        """Return the next events, or none when it is time to look at the jobs."""
        # Its own limit is the short one, however busy this machine is.
        told = await self._m.during(news.next(LOOK, *self._settling), LOOK * 100, "an event")
        for task in [task for task in self._settling if task.done()]:
            self._settling.remove(task)
            task.result()
        return told

    async def _advance(self, told: list[tuple[Vm, dict[str, Any]]]) -> None:
        """React to what was told, or look at the jobs."""
        for vm, event in told:
            job = self._jobs.called(vm, event.get("device"))
            if event["event"] == "BLOCK_JOB_COMPLETED" and job and not job.done:
                await self._complete(job, event)
        if not self._jobs.running:
            return
        if trouble := await self._trouble(told):
            await self._recovery.recover(trouble)
        else:
            await self._look()

    async def _complete(self, job: Job, event: dict[str, Any]) -> None:
        """Take a job's end for what it is."""
        if event.get("error") or event["offset"] != event["len"]:
            why = f"the stream{self._m.about(job.disk)} failed: {event.get('error', 'too short')}"
            raise await self._recovery.advised(why, await advice.server_hangs(self._m))
        job.done = True
        self._settling.add(asyncio.create_task(self._settle(job.disk)))
        if self._jobs.speed:
            await self._jobs.share_speed()

    async def _settle(self, disk: PlannedDisk) -> None:
        """See that the image is whole, and that a power failure on B does not change that."""
        m = self._m
        end = m.since_arrival
        await engine_for(m).confirm(m, disk)
        seconds = 0.0
        try:
            seconds = await engine_for(m).account(m, disk)
        except VmGoneError as error:
            m.report.note(f"{error}, with all of {disk.target} there; what came of it stands in its log")
        self._compared = max(self._compared, end)
        self._local = max(self._local, end - seconds)
        syncing = sync(m.host_b, [disk.target], self._limits.stall)
        await m.during(syncing, math.inf, f"writing {disk.target} to stable storage")
        if len(m.pending) > 1:
            # That of the last one begins a phase.
            m.record(disks=m.state.with_complete(disk))

    async def _trouble(self, told: list[tuple[Vm, dict[str, Any]]]) -> str:
        """Return what is wrong, if anything."""
        b = self._m.b
        for child in (self._m.server, carriers.process(self._m)):
            if child and not child.running:
                return f"{child.name} {await child.wait()}"
        of_disks = [event for vm, event in told if self._is_ours(vm, event)]
        # Of the guest's errors another monitor than the job's tells.
        if not of_disks and all(vm is b for vm in self._jobs.monitors):
            return ""
        # An event may be older than the last recovery.
        if not (await self._recovery.guest_waits() or await self._jobs.waiting()):
            return ""
        event = of_disks[0] if of_disks else {}
        who = "B's QEMU" if b else "nbd-overlay"
        return f"{who} cannot {event.get('operation', 'go on')} ({event.get('reason', 'the stream')})"

    def _is_ours(self, vm: Vm, event: dict[str, Any]) -> bool:
        """Tell whether an event is about a disk, and an error."""
        if event["event"] == "BLOCK_JOB_COMPLETED":
            return False
        names = (event.get("node-name"), event.get("device"))
        return any(self._jobs.of_device(vm, name) for name in names)

    async def _is_written(self, job: Job) -> bool:
        """Tell whether a job that has come to its end has its disk write since this was asked last."""
        if job.bytes_missing:
            return False
        written = self._written.setdefault(job.disk.target, Written(self._m.host_b, [job.disk.target]))
        return await self._m.during(written.has_moved(), self._limits.stall, "looking at B's disk")

    async def _look(self) -> None:
        """Report how far the jobs are; MigrationError when one has not moved for too long."""
        progress = await self._pace.look()
        self._m.report.progress(progress)
        self._m.journal.note_progress(progress)
        for job in self._jobs.running:
            if job.still.seconds > self._limits.stall and await self._is_written(job):
                # Everything is there, and may take long to be on stable storage.
                job.still.restart()
            elif job.still.seconds > self._limits.stall:
                why = f"the stream{self._m.about(job.disk)} has not moved for {self._limits.stall:g} s"
                raise await self._recovery.advised(why, await advice.server_hangs(self._m))
            elif job.still.seconds > SUSPICIOUS and now() - self._looked > SUSPICIOUS:
                await self._recovery.refuse_lost_source()
                self._looked = now()
