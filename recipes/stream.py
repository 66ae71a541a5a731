"""Step 5: copy every block that is not local yet, and take it up again whenever A could not be reached.

What QEMU 7.2 does when the export is away (measured): a request waits for the reconnect-delay. Then the guest
is paused (state ``io-error``), and so is the job, with nothing lost. QEMU goes on connecting by itself, after
1, 2, 4, 8 and then every 16 seconds, and until that has worked ``cont`` ends in the next error.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from qemu.qmp import EventListener

from nbdserve.clock import now
from nbdserve.errors import MigrationError
from recipes.children import Child
from recipes.migration import Migration
from recipes.report import Progress
from recipes.steps import check_export, server_command, start_server
from recipes.vm import CommandError, Vm, VmGoneError, VmSilentError

JOB = "stream"
"""The block job's name."""

LOOK = 0.5
"""Seconds between two looks at the job."""

HOLD = 1.0
"""Seconds that guest and job must go on before the interruption counts as over."""

RATE_WINDOW = 5.0
"""Seconds over which the rate is averaged."""

RESTART_PAUSE = 1.0
"""Seconds between two attempts to reach the export again."""


async def stream(m: Migration) -> str:
    """Step 5: until every block is in the overlay, and on stable storage there."""
    await Stream(m, await m.engine.monitor(m)).run()
    await m.engine.confirm(m)
    # From here on nothing on A is needed: make sure that a power failure on B does not change that.
    image, limit = m.plan.destination.image, m.plan.limits.stall
    await m.during(
        m.host_b.run("sync", "--", image, limit=limit), limit, f"writing {image} to stable storage"
    )
    m.complete = True
    again = f", interrupted {m.recoveries} times" if m.recoveries else ""
    return f"every block of {m.size} bytes is in {image}{again}"


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
        """Bytes per second of late."""
        (begin, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - begin) if end > begin else 0.0

    @property
    def still(self) -> float:
        """Seconds without any movement."""
        return self._clock() - self._moved


class Stream:
    """The block job on B, and the export that feeds it."""

    def __init__(self, m: Migration, jobs: Vm) -> None:
        """``jobs`` is the monitor that the stream is told to: B's QEMU, or nbd-overlay."""
        self._m = m
        self._b = m.monitor_b
        self._jobs = jobs
        self._limits = m.plan.limits
        # A monitor can be blocked while a node waits for its connection.
        self._patience = self._limits.command + self._limits.reconnect_delay
        self._restarts = 0
        self._meter = Meter(now)

    async def run(self) -> None:
        """Stream to the end; MigrationError says what to do when that cannot be reached."""
        while True:
            try:
                await self._stream()
                return
            except VmGoneError as error:
                if self._jobs is self._b or not self._b.connected or self._restarts >= self._limits.restarts:
                    raise
                self._restarts += 1
                self._m.recoveries += 1
                self._m.report.note(f"{error}; it is started again, and the guest waits")
                self._jobs = await self._m.engine.monitor(self._m)

    async def _stream(self) -> None:
        """Start the job, and follow it to its end. VmGoneError when what streams has died."""
        device = self._m.engine.streamed(self._m.plan)
        with self._jobs.events("BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR", "BLOCK_IO_ERROR") as news:
            speed = self._m.plan.limits.speed
            if await self._job() is None:
                start = {"job_id": JOB, "device": device, "speed": speed, "on_error": "stop"}
                await self._execute("block-stream", self._jobs, **start)
            while not await self._advance(await self._next(news)):
                pass

    async def _next(self, news: EventListener) -> dict[str, Any]:
        """The next event, or an empty one when it is time to look at the job."""
        try:
            return await self._m.during(self._jobs.next_event(news, LOOK, "an event"), LOOK * 4, "an event")
        except VmSilentError:
            return {}

    async def _advance(self, event: dict[str, Any]) -> bool:
        """React to an event; True when the stream is complete."""
        if event.get("event") == "BLOCK_JOB_COMPLETED":
            if event.get("error") or event["offset"] != event["len"]:
                raise MigrationError(
                    await self._advice(f"the stream failed: {event.get('error', 'too short')}")
                )
            return True
        trouble = await self._trouble(event)
        if trouble:
            await self._recover(trouble)
        else:
            await self._look()
        return False

    async def _trouble(self, event: dict[str, Any]) -> str:
        """What is wrong, if anything."""
        if not self._server.running:
            return f"{self._server.name} {await self._server.wait()}"
        ours = (self._m.plan.destination.node, JOB)
        told = event.get("node-name") in ours or event.get("device") in ours
        # Of the guest's errors another monitor than the job's tells.
        if not told and self._jobs is self._b:
            return ""
        # An event may be older than the last recovery.
        if not await self._guest_waits() and not await self._job_waits():
            return ""
        return f"B's QEMU cannot {event.get('operation', 'go on')} ({event.get('reason', 'the stream')})"

    async def _look(self) -> None:
        """Report how far the job is; MigrationError when it has not moved for too long."""
        job = await self._job()
        if job is None:
            return
        self._meter.note(job["offset"])
        assert self._m.arrived is not None
        window = time.monotonic() - self._m.arrived
        self._m.report.progress(Progress(job["offset"], job["len"], self._meter.rate, window))
        if self._meter.still > self._limits.stall:
            raise MigrationError(await self._advice(f"the stream has not moved for {self._limits.stall:g} s"))

    async def _recover(self, trouble: str) -> None:
        """Bring the export back, then the guest and the job, until they hold."""
        self._m.recoveries += 1
        if await self._is_full():
            overlay = self._m.plan.destination.image
            raise MigrationError(await self._advice(f"there is no space left for {overlay} on B; make room"))
        self._m.report.note(f"{trouble}; the guest waits")
        await self._bring_export_back()
        deadline = now() + self._limits.recover
        good_since = None
        while now() < deadline:
            if not await self._push():
                good_since = None
            elif good_since is None:
                good_since = now()
            elif now() - good_since > HOLD:
                self._m.report.note("the export is back, and the guest and the stream go on")
                return
            if not self._server.running:
                await self._bring_export_back()
            await asyncio.sleep(LOOK)
        raise MigrationError(await self._advice(f"{trouble}, and the stream cannot go on"))

    async def _bring_export_back(self) -> None:
        """See that the right disk is served again, starting the server where it has ended."""
        deadline = now() + self._limits.recover
        while True:
            try:
                if not self._server.running:
                    await self._restart()
                await self._m.during(
                    check_export(self._m), self._limits.connect, "reaching the export from B"
                )
                return
            except MigrationError as error:
                spent = not self._server.running and self._restarts >= self._limits.restarts
                if spent or now() > deadline:
                    raise MigrationError(await self._advice(str(error))) from error
            await asyncio.sleep(RESTART_PAUSE)

    async def _restart(self) -> None:
        """Start the server again, unless that was done too often."""
        if self._restarts >= self._limits.restarts:
            raise MigrationError(f"the server on A {await self._server.wait()}")
        self._restarts += 1
        self._m.server = await start_server(self._m)

    @property
    def _server(self) -> Child:
        """The server of the day."""
        assert self._m.server
        return self._m.server

    async def _push(self) -> bool:
        """Let the guest and the job go on where an error has paused them; True when there was no need to."""
        guest, job = await self._guest_waits(), await self._job_waits()
        with suppress(CommandError):
            if guest:
                await self._execute("cont")
            if job:
                await self._execute("block-job-resume", self._jobs, device=JOB)
        return not guest and not job

    async def _guest_waits(self) -> bool:
        """Whether an error has paused the guest. One that the operator has paused is in another state."""
        return bool((await self._execute("query-status"))["status"] == "io-error")

    async def _job_waits(self) -> bool:
        """Whether the job is paused."""
        job = await self._job()
        return job is not None and job["status"] == "paused"

    async def _is_full(self) -> bool:
        """Whether the guest or the job waits for space on B, not for A."""
        node = self._m.plan.destination.node
        devices: list[dict[str, Any]] = await self._execute("query-block")
        ours = [each for each in devices if each.get("inserted", {}).get("node-name") == node]
        job = await self._job()
        return any(each.get("io-status") == "nospace" for each in (*ours, *([job] if job else [])))

    async def _job(self) -> dict[str, Any] | None:
        """The block job, or None when it has ended."""
        jobs: list[dict[str, Any]] = await self._execute("query-block-jobs", self._jobs)
        return next((job for job in jobs if job["device"] == JOB), None)

    async def _execute(self, command: str, vm: Vm | None = None, **arguments: object) -> Any:
        """Execute a command, on B's QEMU unless another monitor is given."""
        work = (vm or self._b).execute(command, limit=self._patience, **arguments)
        return await self._m.during(work, self._patience * 2, command)

    async def _advice(self, reason: str) -> str:
        """One line for an operator who must take over."""
        state = "unknown"
        with suppress(MigrationError):
            state = (await self._execute("query-status"))["status"]
        image, there = self._m.plan.source.image, self._m.plan.destination
        jobs = "it" if self._jobs is self._b else f"nbd-overlay's, {there.overlay_monitor},"
        server = shlex.join([*self._m.host_a.argv(server_command(self._m)), image])
        return (
            f"{reason}; the guest on B (state {state}) waits as soon as it needs A, and nothing is lost: its "
            f"disk is {there.image} on B together with {image} on A; see that this runs on A: {server}; then "
            f"give B's monitor, {there.qmp}, cont until it holds, and {jobs} block-job-resume for {JOB}"
        )
