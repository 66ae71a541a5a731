"""Step 5: copy every block that is not local yet; interruptions are in recovery.py."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nbdserve.common.clock import now
from nbdserve.qmp.client import EventListener
from recipes.engines.choice import engine_for
from recipes.errors import MigrationError
from recipes.migrate.progress import Progress
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase
from recipes.qemu.vm import Vm, VmGoneError, VmSilentError
from recipes.steps import advice
from recipes.steps.recovery import JOB, LOOK, Recovery
from recipes.steps.without_guest import go_without_guest

RATE_WINDOW = 5.0
"""Seconds over which the rate is averaged."""


async def stream(m: Migration) -> str:
    """Step 5: until every block is in the overlay, and on stable storage there."""
    m.enter(Phase.STREAM)
    try:
        await Stream(m, await engine_for(m).monitor(m)).run()
    except MigrationError:
        # A guest that has shut down needs its disk no less than before; one whose QEMU died may be started
        # again at once, on what is there.
        if not (await m.guest_has_ended() and m.guest_end and m.guest_end.good):
            raise
        await go_without_guest(m)
        await Stream(m, await engine_for(m).monitor(m)).run()
    await engine_for(m).confirm(m)
    # From here on nothing on A is needed: make sure that a power failure on B does not change that.
    image, limit = m.plan.destination.image, m.plan.limits.stall
    await m.during(
        m.host_b.run("sync", "--", image, limit=limit), limit, f"writing {image} to stable storage"
    )
    whole = tuple(replace(disk, complete=True) for disk in m.state.disks)
    m.enter(Phase.COMPLETE, disks=whole, window=m.since_arrival)
    again = f", interrupted {m.state.recoveries} times" if m.state.recoveries else ""
    return f"every block of {m.disk.size} bytes is in {image}{again}"


class Meter:
    """How fast something moves, and since when it does not."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        """``clock`` is what stillness is measured by; by default the one that never stops."""
        self._clock = clock or time.monotonic
        self._moved = self._clock()
        self._samples = deque([(time.monotonic(), 0)])

    def note(self, done: int) -> None:
        """Note how many bytes are done now."""
        time_now = time.monotonic()
        if done != self._samples[-1][1]:
            self._moved = self._clock()
        self._samples.append((time_now, done))
        while time_now - self._samples[0][0] > RATE_WINDOW:
            self._samples.popleft()

    @property
    def rate(self) -> float:
        """Return bytes per second of late."""
        (begin, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - begin) if end > begin else 0.0

    @property
    def still(self) -> float:
        """Return seconds without any movement."""
        return self._clock() - self._moved


class Stream:
    """The block job on B, and the export that feeds it."""

    def __init__(self, m: Migration, jobs: Vm) -> None:
        """``jobs`` is the monitor that the stream is told to: B's QEMU, or nbd-overlay."""
        self._m = m
        self._limits = m.plan.limits
        self._recovery = Recovery(m, jobs)
        self._restarts = 0
        self._meter = Meter(now)

    @property
    def _jobs(self) -> Vm:
        return self._recovery.jobs

    async def run(self) -> None:
        """Stream to the end; MigrationError says what to do when that cannot be reached."""
        while True:
            try:
                await self._stream()
                return
            except VmGoneError as error:
                if self._jobs is self._m.b or (self._m.b and not self._m.b.connected):
                    raise
                await self._restart_overlay(error)
            except VmSilentError as error:
                of_overlay = self._jobs is not self._m.b and str(error).startswith(self._jobs.name)
                remedy = advice.overlay_silent if of_overlay else advice.qemu_silent
                raise await self._recovery.advised(str(error), await remedy(self._m)) from error

    async def _restart_overlay(self, error: VmGoneError) -> None:
        """nbd-overlay has died: start it again, unless that was done too often or cannot be done."""
        why: MigrationError = error
        if self._restarts < self._limits.restarts:
            self._restarts += 1
            self._m.record(recoveries=self._m.state.recoveries + 1)
            self._m.report.note(f"{error}; it is started again, and the guest waits")
            try:
                self._recovery.jobs = await engine_for(self._m).monitor(self._m)
                return
            except MigrationError as refusal:
                if await self._m.guest_has_ended():
                    raise
                why = refusal
        raise await self._recovery.advised(str(why), await advice.overlay_dead(self._m)) from why

    async def _stream(self) -> None:
        """Start the job, and follow it to its end. VmGoneError when what streams has died."""
        device = engine_for(self._m).streamed(self._m.plan)
        with self._jobs.events("BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR", "BLOCK_IO_ERROR") as news:
            speed = self._limits.speed
            waits = self._waits
            if await self._recovery.job() is None:
                start = {"job-id": JOB, "device": device, "speed": speed, "on-error": "stop"}
                await self._recovery.execute("block-stream", given=start)
                waits = self._recovery.guest_waits
            if await waits():
                # Of a job that was there before, and of a guest that waited before, nobody tells why.
                await self._recovery.recover("guest or stream were interrupted before", old=True)
            while not await self._advance(await self._next(news)):
                pass

    async def _next(self, news: EventListener) -> dict[str, Any]:
        """Return the next event, or an empty one when it is time to look at the job."""
        try:
            # Its own limit is the short one, however busy this machine is.
            return await self._m.during(self._jobs.next_event(news, LOOK, "an event"), LOOK * 100, "an event")
        except VmSilentError:
            return {}

    async def _advance(self, event: dict[str, Any]) -> bool:
        """React to an event; True when the stream is complete."""
        if event.get("event") == "BLOCK_JOB_COMPLETED":
            if event.get("error") or event["offset"] != event["len"]:
                why = f"the stream failed: {event.get('error', 'too short')}"
                raise await self._recovery.advised(why, await advice.server_hangs(self._m))
            return True
        trouble = await self._trouble(event)
        if trouble:
            await self._recovery.recover(trouble)
        else:
            await self._look()
        return False

    async def _trouble(self, event: dict[str, Any]) -> str:
        """Return what is wrong, if anything."""
        server = self._m.server
        if server and self._recovery.server_has_ended:
            return f"{server.name} {await server.wait()}"
        ours = (self._m.plan.destination.node, JOB)
        told = event.get("node-name") in ours or event.get("device") in ours
        # Of the guest's errors another monitor than the job's tells.
        if not told and self._jobs is self._m.b:
            return ""
        # An event may be older than the last recovery.
        if not await self._waits():
            return ""
        who = "B's QEMU" if self._m.b else "nbd-overlay"
        return f"{who} cannot {event.get('operation', 'go on')} ({event.get('reason', 'the stream')})"

    async def _waits(self) -> bool:
        """Tell whether an error has paused the guest or the job."""
        return await self._recovery.guest_waits() or await self._recovery.job_waits()

    async def _look(self) -> None:
        """Report how far the job is; MigrationError when it has not moved for too long."""
        job = await self._recovery.job()
        if job is None:
            return
        self._meter.note(job["offset"])
        window = self._m.since_arrival
        progress = Progress(job["offset"], job["len"], self._meter.rate, window)
        self._m.report.progress(progress)
        self._m.journal.note_progress(progress)
        if self._meter.still > self._limits.stall:
            why = f"the stream has not moved for {self._limits.stall:g} s"
            raise await self._recovery.advised(why, await advice.server_hangs(self._m))
