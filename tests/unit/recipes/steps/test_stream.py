"""The end of a stream that fails: what else was under way is ended with it, and says nothing of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from recipes.engines.jobs import Job, Stillness
from recipes.errors import MigrationError
from recipes.hosts.stable_storage import Written
from recipes.migrate.progress import Progress, Report
from recipes.migrate.runtime import Migration
from recipes.plans.disks import PlannedDisk
from recipes.plans.limits import Limits
from recipes.qemu.vm import VmGoneError
from recipes.steps import advice
from recipes.steps.stream import Stream


def test_what_was_under_way_for_a_complete_disk_ends_with_the_stream_and_says_nothing(
    tmp_path: Path,
) -> None:
    complaints: list[dict[str, Any]] = []
    ended: list[str] = []

    async def settle(*, fails: bool) -> None:
        if fails:
            raise MigrationError("B's QEMU has ended")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("it was cancelled")

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        plan = SimpleNamespace(limits=Limits())
        state, journal = SimpleNamespace(finish_by=0.0), SimpleNamespace(directory=tmp_path)
        m = SimpleNamespace(plan=plan, disks=(), state=state, journal=journal, b=None)
        stream = Stream(cast(Migration, m))

        async def fail() -> None:
            stream._settling |= {asyncio.create_task(settle(fails=fails)) for fails in (True, False)}
            await asyncio.sleep(0)
            raise MigrationError("the stream failed")

        stream._stream = fail  # type: ignore[method-assign]
        stream._jobs.find = lambda **_: asyncio.sleep(0)  # type: ignore[method-assign]
        with contextlib.suppress(MigrationError):
            await stream.run()
            pytest.fail("it has not failed")
        assert ended == ["it was cancelled"]

    asyncio.run(run())
    gc.collect()
    assert complaints == []


@pytest.mark.parametrize("writes", [True, False])
def test_a_job_of_which_everything_is_there_is_waited_for_as_long_as_its_disk_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, writes: bool
) -> None:
    """As nbd-overlay has it all on stable storage before it is over."""

    async def has_moved(_: object) -> bool:
        return writes

    async def look() -> Progress:
        return Progress(1, 1, 0.0, 1.0)

    monkeypatch.setattr(Written, "has_moved", has_moved)
    limits = Limits(stall=60.0)
    state, journal = SimpleNamespace(finish_by=0.0), SimpleNamespace(directory=tmp_path)
    journal.note_progress = lambda _: None
    m = SimpleNamespace(plan=SimpleNamespace(limits=limits), disks=(), state=state, journal=journal, b=None)
    m.host_b, m.report, m.about = None, Report(), lambda _: ""
    m.during = lambda work, *_: work
    stream = Stream(cast(Migration, m))
    stream._pace.look = look  # type: ignore[method-assign]
    still = Stillness(iter([0.0, 100.0, 100.0, 100.0, 100.0]).__next__)
    job = SimpleNamespace(done=False, still=still, bytes_missing=0, disk=SimpleNamespace(target="/b"))
    stream._jobs.all = [cast(Job, job)]
    monkeypatch.setattr(advice, "server_hangs", lambda _: asyncio.sleep(0, ""))
    stream._recovery.advised = lambda why, _: asyncio.sleep(0, MigrationError(why))  # type: ignore
    if writes:
        asyncio.run(stream._look())
        assert still.seconds == 0
        return
    with pytest.raises(MigrationError, match="has not moved for 60 s"):
        asyncio.run(stream._look())


def test_an_overlay_that_has_ended_when_everything_is_there_costs_only_what_it_had_counted() -> None:
    """It is started again for its guest, and the disk is as complete as before."""
    told: list[str] = []

    async def gone(*_: object) -> float:
        raise VmGoneError("nbd-overlay has ended")

    async def nothing(*_: object, **__: object) -> str:
        return ""

    engine = SimpleNamespace(confirm=nothing, account=gone)
    disk = SimpleNamespace(target="/b.raw")
    m = SimpleNamespace(plan=SimpleNamespace(limits=Limits()), since_arrival=1.0, pending=[disk])
    m.host_b, m.during = SimpleNamespace(run=nothing), lambda work, *_: work
    m.report = SimpleNamespace(note=told.append)
    stream = Stream.__new__(Stream)
    stream._m, stream._limits, stream._local, stream._compared = cast(Any, m), Limits(), 0.0, 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.steps.stream.engine_for", lambda _: engine)
        asyncio.run(stream._settle(cast(PlannedDisk, disk)))
    assert told == ["nbd-overlay has ended, with all of /b.raw there; what came of it stands in its log"]


@pytest.mark.parametrize("again", [True, False])
def test_only_who_asks_to_go_on_has_a_difference_compared_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, again: bool
) -> None:
    """One that was found before the command listened is no less a difference, though nobody heard of it."""
    asked: list[str] = []
    verify = {"differing": 1, "first": 65536}
    answers = {
        "query-status": {"status": "running"},
        "query-overlay": {"phase": "failed", "error": "1 block differs", "verify": verify, "sources": []},
        "query-block-jobs": [{"device": "stream", "status": "paused", "offset": 0, "len": 1}],
        "query-block": [],
        "block-job-set-speed": {},
    }

    async def execute(vm: object, command: str, given: object = None) -> Any:
        asked.append(command)
        if command == "block-job-resume":
            raise MigrationError("it goes on")
        return answers[command]

    state = SimpleNamespace(finish_by=0.0, recoveries=0, disk=lambda _: SimpleNamespace(on_a="/a"))
    m = SimpleNamespace(plan=SimpleNamespace(limits=Limits()), disks=(), state=state, b=SimpleNamespace())
    m.journal, m.report, m.record = SimpleNamespace(directory=tmp_path), Report(), lambda **_: None
    m.child, m.server, m.finish = (lambda _: None), None, "nbd-migrate resume vm"
    disk = SimpleNamespace(target="/b", image="/a", drive="disk0")
    stream = Stream(cast(Migration, m), again=again)
    job = Job.__new__(Job)
    vars(job).update(
        done=False, vm=object(), disk=disk, device="disk0", name="stream", still=Stillness(lambda: 0.0)
    )
    stream._jobs.all = [job]
    stream._jobs.execute = execute  # type: ignore[method-assign]
    stream._recovery._size_of_log = lambda: asyncio.sleep(0, 0)  # type: ignore[method-assign]
    stream._recovery.bring_export_back = lambda: asyncio.sleep(0)  # type: ignore[method-assign]
    monkeypatch.setattr(stream._recovery, "refuse_lost_source", lambda **_: asyncio.sleep(0))
    monkeypatch.setattr("recipes.steps.stream.heard", lambda _: contextlib.nullcontext())
    what = "it goes on" if again else "/b on B, compared with /a on A: 1 block differs; the guest is on B"
    with pytest.raises(MigrationError, match=what):
        asyncio.run(stream._stream())
    assert ("block-job-resume" in asked) == again
