"""What an operator does to a migration while it runs, and what it says then."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import psutil
import pytest

from recipes.migrate import journal
from recipes.migrate.progress import Progress
from recipes.migrate.state import Phase
from tests.support.processes import Process, run, wait_until
from tests.support.vms import NBD_MIGRATE, Role, TwoMonitors, monitor, running

SECONDS = 60.0
SLOW = 1 << 14
"""Bytes per second: at this rate the RAM of the guest takes many minutes."""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoMonitors]:
    """A guest that runs on A, whose QEMU has a second monitor, and a journal of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    directory = tmp_path / "hosts"
    directory.mkdir()
    made = TwoMonitors(directory)
    with running(made):
        yield made


def throttle(stage: TwoMonitors, bytes_per_second: int = SLOW) -> None:
    """The RAM moves at this rate; what little is left of it must be little indeed for the switch-over."""
    with monitor(stage.second) as a:
        a.execute("migrate-set-parameters", max_bandwidth=bytes_per_second, downtime_limit=1)


def wait_until_ram_moves(stage: TwoMonitors) -> None:
    """The migration is under way on A."""
    with monitor(stage.second) as a:
        wait_until(lambda: a.execute("query-migrate").get("status") == "active", "the RAM moves", SECONDS)


def status(*options: str) -> str:
    """What ``nbd-migrate status`` says of the migration; nothing before it is known."""
    return run(NBD_MIGRATE, "status", "a", *options).stdout


@pytest.mark.representative
def test_a_guest_that_was_paused_on_a_is_said_to_be_paused_on_b(stage: TwoMonitors) -> None:
    throttle(stage)
    with stage.run() as migration:
        wait_until_ram_moves(stage)
        with monitor(stage.second) as a:
            a.execute("stop")
        throttle(stage, 1 << 30)
        assert migration.wait(SECONDS) == 0
    cont = (
        "the guest came to B paused, as it was on A; its disk follows; to let it run: "
        f"nbd-migrate qmp {stage.monitor_b} cont"
    )
    assert cont in migration.output()
    assert cont in status()
    assert journal.last("a").phase is Phase.DONE
    assert run(NBD_MIGRATE, *cont.split()[-3:]).returncode == 0
    stage.wait_until_guest_works("b")


def test_ram_that_moves_slowly_goes_on_for_as_long_as_it_takes(stage: TwoMonitors) -> None:
    stage.change("limits", silence=4.0)
    throttle(stage)
    with stage.run() as migration:
        wait_until_ram_moves(stage)
        with monitor(stage.second) as a:
            wait_until(
                lambda: a.execute("query-migrate")["total-time"] > 12_000, "it takes its time", SECONDS
            )
            assert a.execute("query-migrate")["status"] == "active"
        assert migration.running
        throttle(stage, 1 << 30)
        assert migration.wait(SECONDS) == 0, migration.output()
    stage.wait_until_guest_works("b")


def test_ram_that_nobody_takes_is_no_migration(stage: TwoMonitors) -> None:
    stage.change("limits", silence=3.0, stop=2.0)
    throttle(stage)
    with stage.run() as migration:
        wait_until_ram_moves(stage)
        [b] = Role.B.find(stage.directory)
        b.suspend()
        # More of it than fits into the socket.
        throttle(stage, 1 << 30)
        assert migration.wait(SECONDS) == 1, migration.output()
    halt = "sending the RAM has come to a halt: no byte has moved for 3 s; the guest runs on A as before"
    assert halt in migration.output()
    assert not psutil.pid_exists(b.pid)
    stage.wait_until_guest_works("a")
    wait_until(lambda: not stage.started(), "nothing is left", SECONDS)


SIZE = 64 << 20
"""Of the guest's disk, in bytes."""


def speed_of_job(stage: TwoMonitors) -> int:
    """The limit of the job that streams, as who streams says it."""
    overlay = Path(f"{stage.overlay}.qmp")
    with monitor(overlay if overlay.exists() else stage.monitor_b) as jobs:
        return int(jobs.execute("query-block-jobs")[0]["speed"])


def wait_until_it_streams(stage: TwoMonitors) -> None:
    """The disk is on its way."""
    wait_until(lambda: "stream: " in status(), "it streams", SECONDS)


@pytest.mark.parametrize("engine", ["overlay", "qemu"])
def test_the_speed_of_a_stream_is_changed_while_it_runs_and_also_holds_when_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    directory = tmp_path / "hosts"
    directory.mkdir()
    # With engine qemu what the guest reads comes beside the stream: it must not be the whole disk soon.
    stage = TwoMonitors(directory, engine, 4 * SIZE)
    stage.change("limits", speed=1 << 20)
    with running(stage):
        with stage.run() as migration:
            wait_until_it_streams(stage)
            assert f" of {4 * SIZE >> 20} MiB  " in status()
            done = run(NBD_MIGRATE, "speed", "a", "512K")
            assert (done.returncode, done.stdout) == (
                0,
                "a: the stream's speed: at most 512 KiB per second\n",
            ), done.stderr
            assert "the stream may take at most 512 KiB per second" in status()
            migration.kill()
        done = run(NBD_MIGRATE, "speed", "a", "64M")
        assert done.returncode == 1
        assert "nobody is at work on a, so nothing was changed: nbd-migrate resume a" in done.stderr
        with resumed(stage) as migration:
            wait_until(lambda: json.loads(status("--json"))["at-work"], "it is taken up", SECONDS)
            wait_until(lambda: speed_known(stage) == 512 << 10, "it goes on at that speed", SECONDS)
            assert run(NBD_MIGRATE, "speed", "a", "0").returncode == 0
            assert migration.wait(SECONDS) == 0, migration.output()
        assert "the stream's speed was changed: no limit" in migration.output()
        stage.wait_until_guest_works("b")


def resumed(stage: TwoMonitors) -> Process:
    """``nbd-migrate resume``."""
    return Process([NBD_MIGRATE, "resume", "a"], stage.directory / "resume.log")


def speed_known(stage: TwoMonitors) -> int:
    """What the journal says of the speed."""
    return journal.last("a").plan.limits.speed


def test_a_stream_ends_when_it_is_to_end(stage: TwoMonitors) -> None:
    by = datetime.now().astimezone() + timedelta(minutes=30)
    with stage.run("--finish-by", by.isoformat()) as migration:
        wait_until_it_streams(stage)
        known = json.loads(status("--json"))
        assert known["finish_by"] == pytest.approx(by.timestamp())
        assert "the stream may take as much as it needs to end by " in status()
        # Half an hour for 64 MiB is slower than the slowest.
        assert journal.progress("a")
        soon = (datetime.now().astimezone() + timedelta(seconds=20)).isoformat()
        assert run(NBD_MIGRATE, "speed", "a", "--finish-by", soon).returncode == 0
        assert migration.wait(SECONDS) == 0, migration.output()
    stage.wait_until_guest_works("b")


def test_what_is_told_of_a_stream_never_goes_back(stage: TwoMonitors) -> None:
    stage.change("limits", speed=4 << 20)
    told: list[Progress] = []
    with stage.run() as migration:
        wait_until_it_streams(stage)
        with Process(
            [NBD_MIGRATE, "status", "a", "--watch", "--json"], stage.directory / "watch.log"
        ) as watching:
            while migration.running:
                known = journal.progress("a")
                if known and known.progress and known.progress not in told[-1:]:
                    told.append(known.progress)
                time.sleep(0.05)
            assert migration.wait(SECONDS) == 0, migration.output()
            assert watching.wait(SECONDS) == 0
    assert [each.done for each in told] == sorted(each.done for each in told)
    assert [each.window for each in told] == sorted(each.window for each in told)
    needed = [each.needed for each in told if each.needed is not None]
    assert needed == sorted(needed, reverse=True)
    open_ones = [json.loads(line)["source-needed"] for line in watching.output().splitlines()]
    assert any(each and each["open"] and each["bytes"] for each in open_ones)
    assert open_ones[-1]["bytes"] == 0
    # How right it is tests/unit/recipes/running/test_estimate.py shows: this machine may be busy.
    known_left = [each.left for each in told if each.left is not None and each.done > SIZE / 4]
    assert known_left
    assert min(known_left) >= 0
    assert json.loads(watching.output().splitlines()[-1])["phase"] == "done"


def test_the_ram_is_told_while_it_moves(stage: TwoMonitors) -> None:
    throttle(stage, 1 << 17)
    with stage.run() as migration:
        wait_until_ram_moves(stage)
        wait_until(lambda: "RAM: " in status(), "it is told", SECONDS)
        assert json.loads(status("--json"))["ram"]["sent"] > 0
        assert run(NBD_MIGRATE, "speed", "a", "32M").returncode == 0
        throttle(stage, 1 << 30)
        assert migration.wait(SECONDS) == 0, migration.output()
    assert journal.last("a").plan.limits.speed == 32 << 20
    page = stage.directory / "page.html"
    assert run(NBD_MIGRATE, "report", "a", "--output", page).returncode == 0
    assert "for so long the guest stood still" in page.read_text()
    told = json.loads(run(NBD_MIGRATE, "report", "a", "--json").stdout)
    assert (told["phase"], told["window"] > 0, told["disks"][0]["complete"]) == ("done", True, True)
    assert run(NBD_MIGRATE, "cleanup").returncode == 0
    assert not list((stage.directory.parent / "state/nbd-migrate").iterdir())
