"""What is done about an interruption while the disk is streamed: the export, the guest and the job come back.

What QEMU 7.2 does when the export is away (measured): a request waits for the reconnect-delay. Then the guest
is paused (state ``io-error``), and so is the job, with nothing lost. QEMU goes on connecting by itself, after
1, 2, 4, 8 and then every 16 seconds, and until that has worked ``cont`` ends in the next error.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

from nbdserve.common.clock import now
from recipes.channel import carriers
from recipes.engines.jobs import Job, Jobs
from recipes.errors import MigrationError
from recipes.fencing.source_images import files_on_a
from recipes.hosts.quoting import listed
from recipes.migrate.runtime import AdvisedError, Migration
from recipes.plans.disks import PlannedDisk
from recipes.processes.children import Child
from recipes.qemu.images import RAW
from recipes.qemu.vm import CommandError
from recipes.steps import advice
from recipes.steps.export import check_exports, start_server

LOOK = 0.5
"""Seconds between two looks at the job."""

HOLD = 1.0
"""Seconds that guest and job must go on before the interruption counts as over."""

RESTART_PAUSE = 1.0
"""Seconds between two attempts to reach the export again."""

DIAGNOSIS = 3.0
"""Seconds between two looks for what else than the export keeps guest and job from going on."""


class Recovery:
    """What brings the guest and the jobs back, on one server."""

    def __init__(self, m: Migration, jobs: Jobs) -> None:
        self._m = m
        self._jobs = jobs
        self._limits = m.plan.limits
        self._restarts = 0

    async def recover(self, trouble: str, *, old: bool = False) -> None:
        """Bring the server back, then guest and jobs, until they hold; MigrationError says what to do.

        ``old`` is trouble of an earlier run, whose cause may have gone since; where the two copies of a disk
        differed, it is for whoever has asked to go on that they are compared again.
        """
        self._m.record(recoveries=self._m.state.recoveries + 1)
        if not old:
            await self._refuse_full()
            await self._refuse_differences()
        await self.refuse_lost_source(lasting=False)
        self._m.report.note(f"{trouble}; the guest waits")
        seen = await self._size_of_log()
        await self.bring_export_back()
        deadline = now() + self._limits.recover
        diagnosis = now() + DIAGNOSIS
        good_since = None
        while now() < deadline:
            if not old:
                await self._refuse_differences()
            # What is found from now on nobody has heard of.
            old = False
            if not await self._push():
                good_since = None
            elif good_since is None:
                good_since = now()
            elif now() - good_since > HOLD:
                self._m.report.note("the export is back, and the guest and the stream go on")
                return
            if self.server_has_ended or self.carrier_has_ended:
                await self.bring_export_back()
            if good_since is None and now() > diagnosis:
                diagnosis = now() + DIAGNOSIS
                await self._diagnose(seen)
            await asyncio.sleep(LOOK)
        raise await self.advised(
            f"{trouble}, and the stream cannot go on", await advice.server_hangs(self._m)
        )

    async def bring_export_back(self) -> None:
        """See that the right disks are served again, starting the server where it has ended."""
        deadline = now() + self._limits.recover
        while True:
            try:
                if self.server_has_ended:
                    await self._restart(self._m.server, start_server)
                if self.carrier_has_ended:
                    await self._restart(carriers.process(self._m), carriers.stand)
                await check_exports(self._m, [job.disk for job in self._jobs.running])
                return
            except MigrationError as error:
                await self.refuse_lost_source()
                ended = self.server_has_ended or self.carrier_has_ended
                spent = ended and self._restarts >= self._limits.restarts
                if spent or now() > deadline:
                    raise await self.advised(str(error), await advice.server_away(self._m)) from error
            await asyncio.sleep(RESTART_PAUSE)

    async def _restart(self, child: Child | None, start: Callable[[Migration], Awaitable[object]]) -> None:
        """Start what has ended again, unless that was done too often."""
        if self._restarts >= self._limits.restarts:
            assert child
            raise MigrationError(f"{child.name} {await child.wait()}")
        self._restarts += 1
        await start(self._m)

    @property
    def carrier_has_ended(self) -> bool:
        """Tell whether what carries beside A's server has ended, where the channel has such a process."""
        carrier = carriers.process(self._m)
        return carrier is not None and not carrier.running

    @property
    def server_has_ended(self) -> bool:
        """Tell whether the server that this migration knows has ended; somebody else's is not looked at."""
        return self._m.server is not None and not self._m.server.running

    async def _push(self) -> bool:
        """Let guest and jobs go on where an error has paused them; True when there was no need to."""
        guest, jobs = await self.guest_waits(), await self._jobs.waiting()
        if guest:
            with suppress(CommandError):
                await self._jobs.execute(self._m.monitor_b, "cont")
        for job in jobs:
            with suppress(CommandError):
                await self._jobs.execute(job.vm, "block-job-resume", {"device": job.name})
        return not guest and not jobs

    async def _diagnose(self, seen: int) -> None:
        """Raise MigrationError where it is not the server that keeps the guest or a job from going on.

        ``seen`` is how many bytes of the server's log are older than this interruption.
        """
        await self._refuse_full()
        await self.refuse_lost_source()
        for job in self._jobs.running:
            if job.vm is not self._m.b:
                told = await self._jobs.execute(job.vm, "query-overlay")
                connected = any(source["connected"] for source in told["sources"])
                if told["phase"] == "failed" and connected:
                    await self._refuse_failed_job(job, str(told["error"]))
        failures = [line for line in (await self._new_in_log(seen)).splitlines() if _FAILS in line]
        if failures:
            disk = self._disk_in(failures[-1])
            why = f"{self._m.state.disk(disk).on_a} on A cannot be read: {failures[-1].strip()}"
            raise await self.advised(why, await advice.bad_source(self._m, disk))

    async def refuse_lost_source(self, *, lasting: bool = True) -> None:
        """Raise MigrationError where a disk on A was cut off or, if trouble is ``lasting``, is gone.

        A server that has a raw file open goes on without its name; of other formats, others open it again.
        """
        m = self._m
        disks = [job.disk for job in self._jobs.running]
        try:
            files = await files_on_a(m, disks)
        except MigrationError:
            # A is away, as whoever needs it says.
            return
        for disk, (image, file) in zip(disks, files, strict=True):
            before = m.state.disk(disk).file
            if not file and before and lasting and (self.server_has_ended or disk.format != RAW):
                why = f"there is no {image} on A any more"
                raise await self.advised(why, await advice.gone_source(m, disk))
            (*is_before, size), (*is_now, left) = (before or "0").split(), (file or "0").split()
            if is_before == is_now and int(left) < int(size):
                why = f"{image} on A was cut off: it has {left} bytes, and had {size}"
                remedy = await advice.cut_off_source(m, image, int(size))
                raise await self.advised(why, remedy, "what is on B stays there")

    def _disk_in(self, line: str) -> PlannedDisk:
        """Return the disk that a line of the server's log is about."""
        names = {f"export {self._m.plan.export_of(disk).export!r}:": disk for disk in self._m.disks}
        return next((disk for name, disk in names.items() if name in line), self._m.disks[0])

    async def _refuse_failed_job(self, job: Job, error: str) -> None:
        """Raise MigrationError for what nbd-overlay says, though it is connected to A: a disk has failed."""
        disk = job.disk
        if _OF_SOURCE in error:
            on_a = self._m.state.disk(disk).on_a
            why, remedy = f"{on_a} on A: {error}", await advice.bad_source(self._m, disk)
        elif error.endswith(_FULL):
            # It was told to go on, and QEMU's word for a full disk is gone with that.
            why = f"there is no space left for {disk.target} on B ({error}); make room"
            remedy = await advice.no_space(self._m, job.bytes_missing)
        else:
            why, remedy = f"{disk.target} on B: {error}", await advice.bad_destination(self._m)
        raise await self.advised(why, remedy)

    async def _size_of_log(self) -> int:
        """Return how many bytes are in the log of the server on A, those of earlier runs too.

        It is 0 if nobody knows.
        """
        with suppress(MigrationError, ValueError):
            log = await self._m.place(self._m.host_a, self._m.disks[0].image, "nbdserve")
            size = self._m.host_a.run("stat", "-c", "%s", "--", f"{log}.log", limit=self._limits.command)
            return int(await size)
        return 0

    async def _new_in_log(self, seen: int) -> str:
        """Return what the server on A has logged since; nothing where that cannot be seen."""
        with suppress(MigrationError):
            log = await self._m.place(self._m.host_a, self._m.disks[0].image, "nbdserve")
            tail = ("tail", "-c", f"+{seen + 1}", "--", f"{log}.log")
            return await self._m.host_a.run(*tail, limit=self._limits.command)
        return ""

    async def guest_waits(self) -> bool:
        """Tell whether an error has paused the guest. One that the operator has paused is in another
        state.
        """
        if self._m.b is None:
            return False
        return bool((await self._jobs.execute(self._m.b, "query-status"))["status"] == "io-error")

    async def _refuse_full(self) -> None:
        """Raise MigrationError where the guest or a job waits for space on B, not for A."""
        b, full = self._m.b, set()
        for each in await self._jobs.execute(b, "query-block") if b else []:
            if each.get("io-status") == "nospace":
                full.add(each.get("inserted", {}).get("node-name"))
        for job in self._jobs.all:
            info = None if job.done else await self._jobs.query(job)
            if info is not None:
                job.note(info)
            if job.disk.drive in full or (info or {}).get("io-status") == "nospace":
                why = f"there is no space left for {job.disk.target} on B; make room"
                raise await self.advised(why, await advice.no_space(self._m, job.bytes_missing))

    async def _refuse_differences(self) -> None:
        """Raise MigrationError where what was copied is not what A has, or where that cannot be told."""
        for job in self._jobs.running:
            if job.vm is not self._m.b:
                told = await self._jobs.execute(job.vm, "query-overlay")
                if told["phase"] != "failed" or told.get("verify") is None:
                    continue
                if told["verify"]["differing"] or str(told["error"]).startswith(_NOT_VERIFIED):
                    on_a = self._m.state.disk(job.disk).on_a
                    why = f"{job.disk.target} on B, compared with {on_a} on A: {told['error']}"
                    remedy = await advice.different(self._m, told["verify"]["first"])
                    raise AdvisedError(f"{why}; the guest is on B and stays there; {remedy}")

    async def advised(self, reason: str, remedy: str, kept: str = "nothing is lost") -> AdvisedError:
        """Return one line for an operator who must take over, to be raised; ``kept`` says what is safe."""
        state = "off"
        if self._m.b:
            state = "unknown"
            with suppress(MigrationError):
                state = (await self._jobs.execute(self._m.b, "query-status"))["status"]
        disks = "disks are" if len(self._m.disks) > 1 else "disk is"
        targets = listed(disk.target for disk in self._m.disks)
        needed = self._m.pending or self._m.disks
        images = listed(self._m.state.disk(disk).on_a for disk in needed)
        return AdvisedError(
            f"{reason}; the guest on B (state {state}) waits as soon as it needs what is missing, and "
            f"{kept}: its {disks} {targets} on B together with {images} on A; {remedy}"
        )


_OF_SOURCE = "the backing at "
"""In what nbd-overlay says of a part of the disk that no server could read."""

_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
"""How it ends where there is no space left on B."""

_NOT_VERIFIED = "the copy cannot be verified"
"""In the same where A's server tells no hashes."""

_FAILS = " fails with "
"""In the line that nbdserve logs of a request that its disk has failed."""
