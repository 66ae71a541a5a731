"""The copying before the cut-over: nbd-overlay's own job for each disk, told to begin, and followed."""

from __future__ import annotations

import asyncio
import math

from recipes.engines.jobs import Job, Jobs
from recipes.engines.pace import Pace
from recipes.errors import MigrationError
from recipes.hosts.stable_storage import sync
from recipes.migrate.progress import Progress
from recipes.migrate.runtime import Migration
from recipes.precopy.convergence import Pace as Expected
from recipes.precopy.rehearsal import Rehearsal

ENOUGH = 4 << 20
"""Bytes of a round that say how fast the next one is."""


class Copier:
    """The jobs of all disks, which go on until the guest is on B, and after that.

    expected  what the window is made of, by what was measured
    """

    def __init__(self, m: Migration) -> None:
        self._m = m
        self._jobs = Jobs(m)
        self._pace = Pace(m, self._jobs)
        self._resumed = 0
        self._rehearsal = Rehearsal(m)
        self._rate = self._seen = 0.0

    @property
    def expected(self) -> Expected:
        """Return what the window is made of, by what was measured."""
        speed = self._jobs.speed
        rate = self._rate or self._seen or speed
        rate = min(rate, speed) if speed else rate
        return Expected(rate, self._rehearsal.beside, self._rehearsal.after)

    @property
    def missing(self) -> int:
        """Return how many bytes are to come, as far as was told last."""
        return self._jobs.missing

    @property
    def moved(self) -> int:
        """Return how many bytes have become local by copying, until now."""
        return self._pace.moved

    async def start(self) -> None:
        """Have every disk copied from now on."""
        await self._jobs.find(arrived=False)
        self._pace.choose(self._jobs.missing)
        await self._jobs.start()

    async def look(self) -> Progress:
        """Look how far the jobs are; MigrationError when one cannot go on, or has not moved for too long."""
        progress = await self._pace.look()
        self._seen = progress.rate
        for job in self._jobs.running:
            if job.ready or not job.bytes_missing:
                # It waits for the guest alone, and does not move.
                job.still.restart()
            elif job.still.seconds > self._m.plan.limits.stall:
                limit = self._m.plan.limits.stall
                raise MigrationError(f"the copying{self._m.about(job.disk)} has not moved for {limit:g} s")
        for job in await self._jobs.waiting():
            await self._resume(job)
        return progress

    @property
    def is_done(self) -> bool:
        """Tell whether everything is there, as far as was told last."""
        return all(job.ready for job in self._jobs.running)

    async def _resume(self, job: Job) -> None:
        """Let a job go on that an error has paused, as one of the network; not for ever."""
        told = await self._jobs.execute(job.vm, "query-overlay")
        if self._resumed >= self._m.plan.limits.restarts or told["phase"] != "failed":
            raise MigrationError(
                f"the copying{self._m.about(job.disk)} has stopped: {told['error'] or 'paused'}"
            )
        self._resumed += 1
        self._m.report.note(
            f"the copying{self._m.about(job.disk)} was interrupted: {told['error']}; it goes on"
        )
        await self._jobs.execute(job.vm, "block-job-resume", {"device": job.name})

    async def settle(self) -> None:
        """Have on stable storage what was copied, so that the window need not wait for that; and see how long
        a window takes in any case.
        """
        m, limits = self._m, self._m.plan.limits
        targets = [disk.target for disk in m.disks]
        await m.during(sync(m.host_b, targets, limits.stall), math.inf, "writing to stable storage")
        await self._rehearsal.run()

    def measured(self, count: int, seconds: float) -> None:
        """Note how long a round took. What moved of late says more than one that also looked for zeros."""
        if count >= ENOUGH or not self._rate:
            self._rate = self._seen or (count / seconds if seconds > 0 else 0.0)

    async def rest(self, seconds: float) -> None:
        """Wait, as long as everything needed lives."""
        await self._m.during(asyncio.sleep(seconds), seconds + self._m.plan.limits.command, "a pause")
