"""The block jobs of several disks: one speed for all, one progress, and what the monitors say of them."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, cast

from recipes.engines.jobs import Job, Jobs
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Disk, Phase, State
from recipes.plans.disks import PlannedDisk
from recipes.plans.limits import Limits
from recipes.plans.plan import Destination, Export, Plan, Source
from recipes.qemu.vm import CommandError, Vm

MIB = 1 << 20
SIZES = (8 * MIB, 4 * MIB, 2 * MIB)


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test in an event loop of its own."""

    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())

    return run


class Monitor:
    """What an nbd-overlay says."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.jobs: list[dict[str, Any]] = []
        self.speeds: list[int] = []

    async def call(self, command: str, given: Mapping[str, Any], *, limit: float) -> object:
        if command == "query-block-jobs":
            return self.jobs
        if not self.jobs and command != "block-stream":
            raise CommandError("no job", "no job")
        self.speeds.append(given["speed"])
        return None

    def is_at(self, offset: int, length: int, status: str = "running") -> None:
        self.jobs = [{"device": "stream", "offset": offset, "len": length, "status": status}]


class Stage:
    """The plan, the state and the waits of a migration of three disks; nothing else is asked for."""

    def __init__(self, speed: int) -> None:
        planned = tuple(PlannedDisk(f"/a{n}", f"/b{n}", f"disk{n}") for n in range(len(SIZES)))
        self.plan = Plan(
            Source(qmp="/a.qmp"),
            Export(uri="nbd://127.0.0.1/vm"),
            Destination(qemu=("qemu",), qmp="/b.qmp", migration="unix:/m"),
            limits=Limits(speed=speed),
            disk=planned,
        )
        disks = tuple(Disk(p.image, p.target, size) for p, size in zip(planned, SIZES, strict=True))
        self.state = State("vm", self.plan, Phase.STREAM, disks=disks)
        self.disks, self.unattended, self.since_arrival = planned, False, 1.0

    async def during(self, work: Any, limit: float, what: str) -> Any:
        return await work


def jobs_at(speed: int) -> tuple[Stage, Jobs, list[Monitor]]:
    stage = Stage(speed)
    jobs = Jobs(cast(Migration, stage))
    monitors = [Monitor(disk.drive) for disk in stage.disks]
    jobs.all = [
        Job(cast(Migration, stage), disk, cast(Vm, monitor))
        for disk, monitor in zip(stage.disks, monitors, strict=True)
    ]
    return stage, jobs, monitors


@in_a_loop
async def test_the_speed_is_divided_among_the_jobs_and_again_when_one_is_done() -> None:
    _, jobs, monitors = jobs_at(speed=900)
    assert await jobs.start() == []
    assert [monitor.speeds for monitor in monitors] == [[300], [300], [300]]
    for monitor in monitors:
        monitor.is_at(0, MIB)
    jobs.all[1].done = True
    await jobs.share_speed()
    assert [monitor.speeds[1:] for monitor in monitors] == [[450], [], [450]]
    jobs.all[0].done = True
    await jobs.share_speed()
    assert monitors[2].speeds == [300, 450, 900]


@in_a_loop
async def test_jobs_that_are_there_already_get_the_speed_of_the_plan() -> None:
    _, jobs, monitors = jobs_at(speed=0)
    monitors[1].is_at(0, MIB)
    assert await jobs.start() == [jobs.all[1]]
    assert [monitor.speeds for monitor in monitors] == [[0], [0], [0]]


@in_a_loop
async def test_a_share_is_never_none_as_that_would_be_no_limit() -> None:
    _, jobs, _ = jobs_at(speed=2)
    assert jobs.share == 1


@in_a_loop
async def test_the_progress_is_that_of_all_disks_and_never_goes_back() -> None:
    stage, jobs, monitors = jobs_at(speed=0)
    for monitor, size in zip(monitors, SIZES, strict=True):
        monitor.is_at(size // 2, size)
    halfway = await jobs.look()
    assert (halfway.done, halfway.total) == (7 * MIB, 14 * MIB)
    # An nbd-overlay that was started again counts less until it has looked.
    monitors[0].is_at(0, SIZES[0])
    assert (await jobs.look()).done == 7 * MIB
    # One that has nothing to do any more has no job, and may not even be there.
    jobs.all[0].done = True
    monitors[0].jobs = []
    assert (await jobs.look()).done == 11 * MIB
    disks = (dataclasses.replace(stage.state.disks[0], complete=True), *stage.state.disks[1:])
    stage.state = dataclasses.replace(stage.state, disks=disks)
    del jobs.all[0]
    assert (await jobs.look()).done == 11 * MIB
    assert (await jobs.look()).total == 14 * MIB


@in_a_loop
async def test_jobs_that_wait_are_found_on_every_monitor() -> None:
    _, jobs, monitors = jobs_at(speed=0)
    for monitor, status in zip(monitors, ("running", "paused", "paused"), strict=True):
        monitor.is_at(0, MIB, status)
    jobs.all[2].done = True
    assert await jobs.waiting() == [jobs.all[1]]


@in_a_loop
async def test_an_event_is_that_of_the_job_on_its_own_monitor() -> None:
    _, jobs, _ = jobs_at(speed=0)
    for job in jobs.all:
        assert jobs.called(job.vm, "stream") is job
        assert jobs.of_device(job.vm, job.disk.drive) is job
    assert jobs.of_device(jobs.all[0].vm, jobs.all[1].disk.drive) is None
