"""What QEMU does with the guest in each state of the switch-over, on which recipes/qemu/source.py relies."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from recipes.qemu.source import WANTED, migration_status, resume, set_capabilities
from recipes.qemu.vm import connect
from tests.support.processes import Process, dying_with_parent, listens, wait_until
from tests.support.vms import QEMU, Monitor, Scene, monitor, scene

NEVER = 1.0
"""Seconds in which nothing happens where nothing is to happen."""


class Switching:
    """A guest on A that stands still at pre-switchover, and B's QEMU, which has a copy of its disk."""

    def __init__(self, stage: Scene, a: Monitor, b: Process) -> None:
        self.stage = stage
        self.a = a
        self.b = b

    @property
    def status(self) -> str:
        """What query-migrate says on A."""
        return str(self.a.execute("query-migrate")["status"])

    def go_on(self, to: str) -> None:
        """Let the switch-over go on to this state."""
        self.a.execute("migrate-continue", state="pre-switchover")
        wait_until(lambda: self.status == to, to)

    def runs_on_a(self) -> None:
        """The guest runs on A."""
        wait_until(lambda: self.a.state == "running", "the guest runs on A")
        self.stage.wait_until_guest_works("a")

    def b_ends(self) -> None:
        """B's QEMU ends by itself."""
        wait_until(lambda: not self.b.running, "B's QEMU ends")


@pytest.fixture
def switching(tmp_path: Path) -> Iterator[Switching]:
    with scene(tmp_path) as stage, standing(stage) as made:
        yield made


@contextmanager
def standing(stage: Scene) -> Iterator[Switching]:
    """Migrate up to pre-switchover."""
    copy, migration = stage.directory / "b.img", f"unix:{stage.directory / 'migration'}"
    copy.write_bytes(stage.original)
    changes = {
        str(stage.image): str(copy),
        str(stage.monitor_a): str(stage.monitor_b),
        "a.serial": "b.serial",
    }
    argv = stage.source_qemu()
    for old, new in changes.items():
        argv = [word.replace(old, new) for word in argv]
    wanted = [{"capability": name, "state": True} for name in ("events", "return-path")]
    with Process([*argv, "-incoming", "defer"], stage.directory / "b.log") as b:
        b.wait_for(lambda: listens(stage.monitor_b), "a monitor")
        with monitor(stage.monitor_b) as destination:
            destination.execute("migrate-set-capabilities", capabilities=wanted)
            destination.execute("migrate-incoming", uri=migration)
        with monitor(stage.monitor_a) as a:
            wanted.append({"capability": "pause-before-switchover", "state": True})
            a.execute("migrate-set-capabilities", capabilities=wanted)
            a.execute("migrate", uri=migration)
            made = Switching(stage, a, b)
            wait_until(lambda: made.status == "pre-switchover", "pre-switchover")
            yield made


@contextmanager
def unless_its_monitor_waits() -> Iterator[None]:
    """Skip the test where A's QEMU does not answer, as it has more to write than B's socket takes."""
    try:
        yield
    except TimeoutError:
        pytest.skip("A's QEMU had more to write than the socket of a QEMU that is stopped takes")


def test_at_pre_switchover_cancelling_lets_the_guest_run_and_ends_the_destination(
    switching: Switching,
) -> None:
    with pytest.raises(ExecuteError):
        switching.a.execute("cont")
    switching.a.execute("migrate_cancel")
    switching.runs_on_a()
    switching.b_ends()


def test_at_pre_switchover_the_source_stands_still_for_ever_when_the_destination_dies(
    switching: Switching,
) -> None:
    switching.b.kill()
    time.sleep(NEVER)
    assert (switching.status, switching.a.state) == ("pre-switchover", "finish-migrate")
    switching.a.execute("migrate_cancel")
    switching.runs_on_a()


def test_a_source_that_is_to_go_on_to_a_dead_destination_takes_its_guest_back(switching: Switching) -> None:
    switching.b.kill()
    with suppress(ExecuteError):
        switching.a.execute("migrate-continue", state="pre-switchover")
    switching.runs_on_a()
    assert switching.status == "failed"


def test_in_the_switch_over_a_source_takes_its_guest_back_when_the_destination_dies(
    switching: Switching,
) -> None:
    switching.b.signal(signal.SIGSTOP)
    with unless_its_monitor_waits():
        switching.go_on("device")
        with pytest.raises(ExecuteError):
            switching.a.execute("cont")
        time.sleep(NEVER)
        assert switching.a.state == "finish-migrate"
    switching.b.kill()
    switching.runs_on_a()


def test_in_the_switch_over_cancelling_lets_the_guest_run_twice(switching: Switching) -> None:
    """Why the destination is ended before a source is told so there."""
    switching.b.signal(signal.SIGSTOP)
    with unless_its_monitor_waits():
        switching.go_on("device")
        switching.a.execute("migrate_cancel")
        switching.runs_on_a()
    switching.b.signal(signal.SIGCONT)
    switching.stage.wait_until_guest_works("b")
    switching.stage.wait_until_guest_works("a")


def test_when_the_guest_has_left_cancelling_does_nothing(switching: Switching) -> None:
    switching.go_on("completed")
    switching.a.execute("migrate_cancel")
    assert (switching.status, switching.a.state) == ("completed", "postmigrate")
    switching.stage.wait_until_guest_works("b")


async def cancelled_early(address: Path, directory: Path) -> None:
    """Cancel a migration at some instant before its guest stands still, and let it go on."""
    a = await connect("A's QEMU", str(address), limit=60.0, command_limit=60.0)
    there = directory / "nobody"
    argv = [*dying_with_parent(signal.SIGKILL), *QEMU, "-incoming", f"unix:{there}", "-S"]
    with (directory / "nobody.log").open("ab") as log, subprocess.Popen(argv, stderr=log) as b:
        try:
            while not listens(there):
                await asyncio.sleep(0.01)
            await set_capabilities(a, WANTED)
            await a.execute("migrate", uri=f"unix:{there}")
            while (status := await migration_status(a)) in ("setup", "active"):
                if status == "active" and random.random() < 0.3:
                    break
            assert await resume(a) == ""
        finally:
            b.kill()
            await a.disconnect()
    there.unlink(missing_ok=True)


@pytest.mark.representative
def test_a_guest_whose_migration_is_cancelled_as_it_stops_for_the_switch_over_goes_on(tmp_path: Path) -> None:
    """QEMU would let it stand for ever."""
    with scene(tmp_path) as stage:
        for _ in range(30):
            asyncio.run(cancelled_early(stage.monitor_a, tmp_path))
        stage.wait_until_guest_works("a")
