"""How a stream goes, and how fast it may go, by what monitors say and operators ask."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from nbdserve.common import clock
from recipes.engines import jobs, pace
from recipes.engines.jobs import Job, Jobs
from recipes.engines.pace import Pace
from recipes.migrate.journal import SPEED_ASKED, Journal
from recipes.migrate.progress import Progress, Report
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Disk, Phase, State
from recipes.plans.disks import PlannedDisk
from recipes.plans.limits import Limits
from recipes.plans.plan import Destination, Export, Plan, Source
from recipes.qemu.vm import CommandError, Vm
from recipes.running import asking, samples, speed
from recipes.running.speed import Asked

MIB = 1 << 20
SIZES = (600 * MIB, 400 * MIB)


class Notes(Report):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Overlay:
    """A disk's nbd-overlay, as its monitor shows it."""

    def __init__(self, size: int) -> None:
        self.size, self.local, self.copied = size, 0, 0
        self.surveyed = True
        self.unstable = 0
        self.misses, self.waited = 0, 0.0
        self.speeds: list[int] = []

    def copy(self, length: int) -> None:
        """So much has come."""
        length = min(length, self.size - self.local)
        self.local += length
        self.copied += length

    async def call(self, command: str, given: Mapping[str, Any], *, limit: float) -> object:
        if command == "query-block-jobs":
            return [{"device": "stream", "offset": self.local, "len": self.size, "status": "running"}]
        if command == "query-overlay":
            rate = 1.0 if self.surveyed else None
            waits = {"misses": self.misses, "miss-seconds": self.waited}
            needed = self.size - self.local + self.unstable
            return {"copied": self.copied, "rate": rate, "needed-bytes": needed, **waits}
        if command != "block-job-set-speed":
            raise CommandError(command, command)
        self.speeds.append(given["speed"])
        return None


class Stage:
    """A migration of two disks whose overlays copy what the test says."""

    def __init__(self, directory: Path, limit: int = 0, finish_by: float = 0.0) -> None:
        planned = tuple(PlannedDisk(f"/a{n}", f"/b{n}", f"disk{n}") for n in range(len(SIZES)))
        plan = Plan(
            Source(qmp="/a.qmp"),
            Export(uri="nbd://127.0.0.1/vm"),
            Destination(qemu=("qemu",), qmp="/b.qmp", migration="unix:/m"),
            limits=Limits(speed=limit),
            disk=planned,
        )
        disks = tuple(Disk(p.image, p.target, size) for p, size in zip(planned, SIZES, strict=True))
        self.journal = Journal.begin("vm", directory)
        self.journal.append(State("vm", plan, Phase.STREAM, disks=disks, finish_by=finish_by))
        self.disks, self.unattended, self.since_arrival, self.b = planned, False, 1.0, None
        self.report = Notes()
        m = cast(Migration, self)
        self.overlays = [Overlay(size) for size in SIZES]
        self.jobs = Jobs(m)
        self.jobs.all = [
            Job(m, disk, cast(Vm, overlay)) for disk, overlay in zip(planned, self.overlays, strict=True)
        ]
        self.pace = Pace(m, self.jobs)
        self.pace.choose(self.jobs.missing)

    @property
    def state(self) -> State:
        assert self.journal.state
        return self.journal.state

    @property
    def pending(self) -> tuple[PlannedDisk, ...]:
        return self.state.pending

    @property
    def plan(self) -> Plan:
        return self.state.plan

    def record(self, **changes: Any) -> None:
        self.journal.append(dataclasses.replace(self.state, **changes))

    async def during(self, work: Any, limit: float, what: str) -> Any:
        return await work


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    clocks = [1000.0]
    for module in (jobs, pace):
        monkeypatch.setattr(module, "now", lambda: clocks[0])
    return clocks


def looks(stage: Stage, ticking: list[float], count: int, each: int) -> list[Progress]:
    """Look so many times, half a second apart, in which so much comes to the disks."""
    found = []

    async def body() -> None:
        for _ in range(count):
            found.append(await stage.pace.look())
            ticking[0] += 0.5
            for overlay in stage.overlays:
                overlay.copy(each // 2)

    clock.run(body())
    return found


def test_the_time_left_is_that_of_all_disks(tmp_path: Path, ticking: list[float]) -> None:
    told = looks(Stage(tmp_path), ticking, 60, 5 * MIB)
    assert told[-1].rate == pytest.approx(10 * MIB, rel=0.01)
    assert told[-1].left == pytest.approx(told[-1].missing / (10 * MIB), rel=0.02)
    assert [each.done for each in told] == sorted(each.done for each in told)


def test_what_is_zeros_is_no_part_of_the_rate(tmp_path: Path, ticking: list[float]) -> None:
    stage = Stage(tmp_path)
    for overlay in stage.overlays:
        overlay.surveyed = False
    told = looks(stage, ticking, 10, 0)
    assert all(each.left is None for each in told)
    for overlay in stage.overlays:
        overlay.local, overlay.surveyed = overlay.size * 3 // 4, True
    told = looks(stage, ticking, 10, 4 * MIB)
    assert told[-1].rate == pytest.approx(8 * MIB, rel=0.01)
    assert told[-1].left == pytest.approx((250 - 18 * 2) / 8, rel=0.1)


def test_an_overlay_that_was_started_again_breaks_nothing(tmp_path: Path, ticking: list[float]) -> None:
    stage = Stage(tmp_path)
    before = looks(stage, ticking, 40, 5 * MIB)
    stage.overlays[0].copied = stage.overlays[0].misses = 0
    stage.overlays[0].local -= MIB
    after = looks(stage, ticking, 40, 5 * MIB)
    assert after[0].done >= before[-1].done
    assert after[-1].rate == pytest.approx(10 * MIB, rel=0.05)
    assert all(each.left is not None and each.left > 0 for each in after)


def test_what_a_is_needed_for_is_that_of_all_disks_and_what_is_only_in_memory_counts(
    tmp_path: Path, ticking: list[float]
) -> None:
    stage = Stage(tmp_path)
    stage.overlays[0].copy(500 * MIB)
    stage.overlays[0].unstable = 3 * MIB
    told = looks(stage, ticking, 1, 0)[0]
    assert (told.missing, told.needed) == (500 * MIB, 503 * MIB)
    # All is here, and not on stable storage: A may not go yet.
    for overlay in stage.overlays:
        overlay.copy(overlay.size)
    assert looks(stage, ticking, 1, 0)[0].needed == 3 * MIB
    stage.overlays[0].unstable = 0
    assert looks(stage, ticking, 1, 0)[0].needed == 0


def test_of_what_b_s_qemu_copies_nobody_knows_what_is_on_stable_storage(
    tmp_path: Path, ticking: list[float]
) -> None:
    stage = Stage(tmp_path)
    job = stage.jobs.all[0]
    stage.b = cast(Any, job.vm)
    assert looks(stage, ticking, 1, 0)[0].needed is None
    job.done = True
    assert looks(stage, ticking, 1, 0)[0].needed is None, "its end is not written down yet"


def test_how_it_went_is_kept(tmp_path: Path, ticking: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1e9 + ticking[0])
    stage.overlays[1].misses, stage.overlays[1].waited = 7, 0.5
    looks(stage, ticking, 20, 5 * MIB)
    kept = samples.load(stage.journal.directory)
    assert len(kept) == 10
    assert (kept[-1].misses, kept[-1].waited, kept[-1].total) == (7, 0.5, 1000 * MIB)
    assert kept[-1].done == 18 * 5 * MIB


def ask(stage: Stage, asked: Asked) -> None:
    """Ask it as ``nbd-migrate speed`` does that waits for it."""
    (stage.journal.directory / SPEED_ASKED).write_text(json.dumps(dataclasses.asdict(asked)))


def test_a_speed_that_is_withdrawn_before_it_was_taken_is_not_kept(
    tmp_path: Path, ticking: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked has been told that nothing was changed."""
    stage = Stage(tmp_path)
    looks(stage, ticking, 4, 5 * MIB)
    before, call = stage.plan, Overlay.call
    asked = Asked.new(speed=6 * MIB)
    ask(stage, asked)

    async def slow(self: Overlay, command: str, given: Mapping[str, Any], *, limit: float) -> object:
        if command == "block-job-set-speed":
            asking.withdraw(stage.journal.directory, speed.WISH, json.dumps(dataclasses.asdict(asked)))
        return await call(self, command, given, limit=limit)

    monkeypatch.setattr(Overlay, "call", slow)
    looks(stage, ticking, 4, 5 * MIB)
    assert [overlay.speeds for overlay in stage.overlays] == [[3 * MIB, 0], [3 * MIB, 0]]
    assert stage.plan == before
    assert stage.report.said[-1] == "that was withdrawn: the stream's speed is as it was before"


def test_a_speed_that_is_asked_is_told_the_jobs_and_written_down(
    tmp_path: Path, ticking: list[float]
) -> None:
    stage = Stage(tmp_path)
    looks(stage, ticking, 4, 5 * MIB)
    asked = Asked.new(speed=6 * MIB)
    ask(stage, asked)
    looks(stage, ticking, 4, 5 * MIB)
    assert [overlay.speeds for overlay in stage.overlays] == [[3 * MIB], [3 * MIB]]
    assert speed.find(stage.journal.directory) is None
    assert stage.plan.limits.speed == 6 * MIB
    assert stage.report.said == ["the stream's speed was changed: at most 6 MiB per second"]
    ask(stage, Asked.new(speed=0))
    looks(stage, ticking, 1, 5 * MIB)
    assert [overlay.speeds[-1] for overlay in stage.overlays] == [0, 0]
    assert stage.plan.limits.speed == 0


def test_the_speed_that_ends_a_stream_in_time_follows_what_is_missing(
    tmp_path: Path, ticking: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9 + ticking[0])
    stage = Stage(tmp_path, finish_by=1e9 + ticking[0] + 100)
    assert stage.jobs.speed == pytest.approx(1.05 * 10 * MIB, rel=0.01)
    # As fast as that: the jobs need not be told.
    looks(stage, ticking, 100, 5 * MIB)
    assert all(len(overlay.speeds) <= 2 for overlay in stage.overlays)
    # The link fails for half of the rest: then it must be twice as fast.
    looks(stage, ticking, 50, 0)
    assert stage.jobs.speed == pytest.approx(1.05 * 20 * MIB, rel=0.1)
    looks(stage, ticking, 60, 0)
    assert stage.jobs.speed == 0
    assert stage.report.said == ["the stream is late: it goes on without a limit"]
    # A speed that is asked for ends that.
    ask(stage, Asked.new(speed=MIB))
    looks(stage, ticking, 1, 0)
    assert (stage.jobs.speed, stage.state.finish_by) == (MIB, 0.0)


def test_a_time_is_asked_of_a_run_as_a_speed_is(
    tmp_path: Path, ticking: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1e9 + ticking[0])
    stage = Stage(tmp_path, limit=MIB)
    looks(stage, ticking, 1, 0)
    ask(stage, Asked.new(finish_by=1e9 + ticking[0] + 500))
    looks(stage, ticking, 2, 0)
    assert stage.jobs.speed == pytest.approx(1.05 * 2 * MIB, rel=0.01)
    assert stage.state.finish_by == 1e9 + 1000 + 500.5
    assert stage.overlays[0].speeds == [stage.jobs.speed // 2]
