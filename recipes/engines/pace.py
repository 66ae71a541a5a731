"""How the stream goes, and how fast it may go: what is told of it, kept of it, and asked of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nbdserve.common.clock import now
from recipes.engines.jobs import Job, Jobs
from recipes.migrate.progress import Progress
from recipes.migrate.runtime import Migration
from recipes.running import speed
from recipes.running.estimate import Estimate
from recipes.running.samples import Sample, Samples

ENOUGH = 0.05
"""The part by which the speed that ends a stream in time must change before its jobs are told."""


class Moved:
    """What has moved of one disk, also when its nbd-overlay was started again and counts from nothing."""

    def __init__(self) -> None:
        self.bytes = 0
        self._seen = 0

    def note(self, count: int) -> None:
        """Note a count that only grows, unless it begins anew."""
        self.bytes += count - self._seen if count >= self._seen else count
        self._seen = count


class Pace:
    """The stream of a migration, which is looked at about twice a second."""

    def __init__(self, m: Migration, jobs: Jobs) -> None:
        self._m = m
        self._jobs = jobs
        self._estimate = Estimate()
        self._samples = Samples(m.journal.directory)
        self._moved: dict[str, Moved] = {}
        self._late = False

    async def look(self) -> Progress:
        """Look how far the jobs are, do what is asked of their speed, and keep how it went."""
        told = await self._jobs.look()
        overlays = [await self._overlay(job) for job in self._jobs.running]
        progress = told
        # Before it is known what is zeros, and where a job rests, nothing is known of the time left.
        if all(each is None or each["rate"] is not None for each in overlays):
            self._estimate.note(now(), self.moved, told.missing)
            progress = replace(told, rate=self._estimate.rate, left=self._estimate.left)
        progress = replace(progress, needed=self._needed(overlays))
        counted = [each for each in overlays if each is not None]
        misses = sum(each["misses"] for each in counted) if counted else -1
        waited = sum(each["miss-seconds"] for each in counted)
        self._samples.note(Sample(time.time(), told.done, told.total, progress.rate, misses, waited))
        await self._obey()
        if self.choose(told.missing):
            await self._jobs.share_speed()
        return progress

    async def _overlay(self, job: Job) -> Mapping[str, Any] | None:
        """Note how much of a disk has moved; return what its nbd-overlay says, None where QEMU copies."""
        moved = self._moved.setdefault(job.disk.drive, Moved())
        if job.vm is self._m.b:
            moved.note(job.offset)
            return None
        told: Mapping[str, Any] = await self._jobs.execute(job.vm, "query-overlay")
        moved.note(told["copied"])
        return told

    def _needed(self, running: list[Mapping[str, Any] | None]) -> int | None:
        """Return how many bytes A is needed for still, by what the nbd-overlays of ``running`` jobs say."""
        needed = 0
        for each in running:
            if each is None or each["needed-bytes"] is None:
                return None
            needed += each["needed-bytes"]
        # One whose job has ended well has said that all of it is on stable storage; B's QEMU has not.
        rest = [job for job in self._jobs.all if job.done and job.vm is self._m.b]
        return None if any(job.disk in self._m.pending for job in rest) else needed

    @property
    def moved(self) -> int:
        """Return how many bytes have moved, as far as was told."""
        return sum(each.bytes for each in self._moved.values())

    def choose(self, missing: int) -> bool:
        """Choose the speed by what is asked, and by what is missing; tell whether the jobs must be told."""
        wanted, by = self._m.plan.limits.speed, self._m.state.finish_by
        if by:
            wanted = speed.in_time(missing, by - time.time())
            if not wanted and not self._late:
                self._m.report.note("the stream is late: it goes on without a limit")
            self._late = not wanted
        known = self._jobs.speed
        if wanted == known or (by and known and wanted and abs(wanted - known) < ENOUGH * known):
            return False
        self._jobs.speed = wanted
        return True

    async def _obey(self) -> None:
        """Do what is asked of the speed, and write it down."""
        before = self._m.state
        if asked := speed.write_down(self._m):
            if self.choose(self._jobs.missing):
                await self._jobs.share_speed()
            if not speed.take(self._m.journal.directory, asked):
                speed.take_back(self._m, before)
                if self.choose(self._jobs.missing):
                    await self._jobs.share_speed()
