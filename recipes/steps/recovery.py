"""What is done about an interruption while the disk is streamed: the export, the guest and the job come back.

What QEMU 7.2 does when the export is away (measured): a request waits for the reconnect-delay. Then the guest
is paused (state ``io-error``), and so is the job, with nothing lost. QEMU goes on connecting by itself, after
1, 2, 4, 8 and then every 16 seconds, and until that has worked ``cont`` ends in the next error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from nbdserve.common.clock import now
from recipes.errors import MigrationError
from recipes.migrate.runtime import AdvisedError, Migration
from recipes.qemu.vm import CommandError, Vm
from recipes.steps import advice
from recipes.steps.export import check_export, start_server

JOB = "stream"
"""The block job's name."""

LOOK = 0.5
"""Seconds between two looks at the job."""

HOLD = 1.0
"""Seconds that guest and job must go on before the interruption counts as over."""

RESTART_PAUSE = 1.0
"""Seconds between two attempts to reach the export again."""

DIAGNOSIS = 3.0
"""Seconds between two looks for what else than the export keeps guest and job from going on."""


class Recovery:
    """What brings guest and job back, on one export."""

    def __init__(self, m: Migration, jobs: Vm) -> None:
        """``jobs`` is the monitor that the stream is told to: B's QEMU, or nbd-overlay."""
        self._m = m
        self.jobs = jobs
        self._limits = m.plan.limits
        # A monitor can be blocked while a node waits for its connection.
        self._patience = self._limits.command + self._limits.reconnect_delay
        self._restarts = 0

    async def recover(self, trouble: str, *, old: bool = False) -> None:
        """Bring the export back, then guest and job, until they hold; MigrationError says what to do.

        ``old`` is trouble of an earlier run, whose cause may have gone since.
        """
        self._m.record(recoveries=self._m.state.recoveries + 1)
        if not old and await self._is_full():
            await self._refuse_full()
        self._m.report.note(f"{trouble}; the guest waits")
        seen = await self._size_of_log()
        await self.bring_export_back()
        deadline = now() + self._limits.recover
        diagnosis = now() + DIAGNOSIS
        good_since = None
        while now() < deadline:
            if not await self._push():
                good_since = None
            elif good_since is None:
                good_since = now()
            elif now() - good_since > HOLD:
                self._m.report.note("the export is back, and the guest and the stream go on")
                return
            if self.server_has_ended:
                await self.bring_export_back()
            if good_since is None and now() > diagnosis:
                diagnosis = now() + DIAGNOSIS
                await self._diagnose(seen)
            await asyncio.sleep(LOOK)
        raise await self.advised(
            f"{trouble}, and the stream cannot go on", await advice.server_hangs(self._m)
        )

    async def bring_export_back(self) -> None:
        """See that the right disk is served again, starting the server where it has ended."""
        deadline = now() + self._limits.recover
        while True:
            try:
                if self.server_has_ended:
                    await self._restart()
                await self._m.during(
                    check_export(self._m), self._limits.connect, "reaching the export from B"
                )
                return
            except MigrationError as error:
                spent = self.server_has_ended and self._restarts >= self._limits.restarts
                if spent or now() > deadline:
                    raise await self.advised(str(error), await advice.server_away(self._m)) from error
            await asyncio.sleep(RESTART_PAUSE)

    async def _restart(self) -> None:
        """Start the server again, unless that was done too often."""
        if self._restarts >= self._limits.restarts:
            assert self._m.server
            raise MigrationError(f"the server on A {await self._m.server.wait()}")
        self._restarts += 1
        await start_server(self._m)

    @property
    def server_has_ended(self) -> bool:
        """Tell whether the server that this migration knows has ended; somebody else's is not looked at."""
        return self._m.server is not None and not self._m.server.running

    async def _push(self) -> bool:
        """Let the guest and the job go on where an error has paused them; True when there was no need to."""
        guest, job = await self.guest_waits(), await self.job_waits()
        with suppress(CommandError):
            if guest:
                await self.execute("cont", self._m.monitor_b)
            if job:
                await self.execute("block-job-resume", given={"device": JOB})
        return not guest and not job

    async def _diagnose(self, seen: int) -> None:
        """Raise MigrationError where it is not the export that keeps the guest or the job from going on.

        ``seen`` is how many bytes of the server's log are older than this interruption.
        """
        if await self._is_full():
            await self._refuse_full()
        if self.jobs is not self._m.b:
            told = await self.execute("query-overlay")
            connected = any(source["connected"] for source in told["sources"])
            if told["phase"] == "failed" and connected:
                await self._refuse_failed_job(str(told["error"]))
        failures = [line for line in (await self._new_in_log(seen)).splitlines() if _FAILS in line]
        if failures:
            why = f"{self._m.plan.source.image} on A cannot be read: {failures[-1].strip()}"
            raise await self.advised(why, await advice.bad_source(self._m))

    async def _refuse_failed_job(self, error: str) -> None:
        """Raise MigrationError for what nbd-overlay says, though it is connected to A: a disk has failed."""
        m = self._m
        if _OF_SOURCE in error:
            why, remedy = f"{m.plan.source.image} on A: {error}", await advice.bad_source(m)
        else:
            why, remedy = f"{m.plan.destination.image} on B: {error}", await advice.bad_destination(m)
        raise await self.advised(why, remedy)

    async def _size_of_log(self) -> int:
        """Return how many bytes are in the log of the server on A, those of earlier runs too.

        It is 0 if nobody knows.
        """
        with suppress(MigrationError, ValueError):
            log = await self._m.place(self._m.host_a, self._m.plan.source.image, "nbdserve")
            size = self._m.host_a.run("stat", "-c", "%s", "--", f"{log}.log", limit=self._limits.command)
            return int(await size)
        return 0

    async def _new_in_log(self, seen: int) -> str:
        """Return what the server on A has logged since; nothing where that cannot be seen."""
        with suppress(MigrationError):
            log = await self._m.place(self._m.host_a, self._m.plan.source.image, "nbdserve")
            tail = ("tail", "-c", f"+{seen + 1}", "--", f"{log}.log")
            return await self._m.host_a.run(*tail, limit=self._limits.command)
        return ""

    async def guest_waits(self) -> bool:
        """Tell whether an error has paused the guest. One that the operator has paused is in another
        state.
        """
        if self._m.b is None:
            return False
        return bool((await self.execute("query-status", self._m.b))["status"] == "io-error")

    async def job_waits(self) -> bool:
        """Tell whether the job is paused."""
        job = await self.job()
        return job is not None and job["status"] == "paused"

    async def _is_full(self) -> bool:
        """Tell whether the guest or the job waits for space on B, not for A."""
        node, devices = self._m.plan.destination.node, []
        if self._m.b:
            devices = [
                each
                for each in await self.execute("query-block", self._m.b)
                if each.get("inserted", {}).get("node-name") == node
            ]
        job = await self.job()
        return any(each.get("io-status") == "nospace" for each in (*devices, *([job] if job else [])))

    async def _refuse_full(self) -> None:
        job = await self.job()
        missing = job["len"] - job["offset"] if job else self._m.disk.size
        why = f"there is no space left for {self._m.plan.destination.image} on B; make room"
        raise await self.advised(why, await advice.no_space(self._m, missing))

    async def job(self) -> dict[str, Any] | None:
        """Return the block job, or None when it has ended."""
        jobs: list[dict[str, Any]] = await self.execute("query-block-jobs")
        return next((job for job in jobs if job["device"] == JOB), None)

    async def execute(
        self, command: str, vm: Vm | None = None, given: Mapping[str, object] | None = None
    ) -> Any:
        """Execute a command, on the job's monitor unless another is given."""
        work = (vm or self.jobs).call(command, given or {}, limit=self._patience)
        return await self._m.during(work, self._patience * 2, command)

    async def advised(self, reason: str, remedy: str) -> AdvisedError:
        """Return one line for an operator who must take over, to be raised."""
        state = "off"
        if self._m.b:
            state = "unknown"
            with suppress(MigrationError):
                state = (await self.execute("query-status", self._m.b))["status"]
        image, there = self._m.plan.source.image, self._m.plan.destination
        return AdvisedError(
            f"{reason}; the guest on B (state {state}) waits as soon as it needs what is missing, and "
            f"nothing is lost: its disk is {there.image} on B together with {image} on A; {remedy}"
        )


_OF_SOURCE = "the backing at "
"""In what nbd-overlay says of a part of the disk that no server could read."""

_FAILS = " fails with "
"""In the line that nbdserve logs of a request that its disk has failed."""
