"""A guest that ends on B while its disk follows: that is no crash, and its disk is completed."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import wait_until
from tests.support.vms import DEVICE, QEMU, Monitor, Role, Scene, TwoMonitors, monitor, running

SECONDS = 60.0
"""More than any of these migrations takes, even on a busy machine."""

ENGINES = ("overlay", "qemu")
MIB = 1 << 20


class Ending(TwoMonitors):
    """A guest whose QEMUs have second monitors, by which it can be ended while it is migrated."""

    def __init__(self, directory: Path, engine: str, *options: str) -> None:
        super().__init__(directory, engine)
        self.second_b = directory / "b2.qmp"
        socket = f"socket,id=second,path={self.second_b},server=on,wait=off"
        self.change(
            "destination",
            qemu=(
                *(*QEMU, *DEVICE, "-serial", f"file:{directory / 'b.serial'}", *options),
                *("-chardev", socket, "-mon", "chardev=second,mode=control"),
            ),
        )
        self.change("limits", speed=8 * MIB)

    def switch_off(self, b: Monitor) -> None:
        """Let the guest switch itself off; see boot_sector()."""
        b.execute("send-key", keys=[{"type": "qcode", "data": "x"}])


@contextmanager
def ending(directory: Path, engine: str, *options: str) -> Iterator[Ending]:
    """A guest that runs on A; ``options`` are for B's QEMU."""
    stage = Ending(directory, engine, *options)
    with running(stage):
        yield stage


def ended_by_signal(said: str, then: str = "its disk is complete") -> bool:
    """Whether a SIGTERM to B's QEMU was told as what it is; the event may be lost with the connection."""
    return f"B's QEMU was ended by a signal (host-signal); {then}" in said or bool(
        re.search(f"B's QEMU ended with code 0: .*terminating on signal 15 .*; {then}", said)
    )


def assert_complete(stage: Scene) -> None:
    """Nothing is left but the guest's disk, and that is whole."""
    assert stage.started() == set()
    assert stage.wrong_sectors(interrupted=True) == []
    assert stage.moved.exists()
    left = {path.name for path in stage.directory.iterdir() if path.name.startswith("b.")}
    assert {name for name in left if not name.endswith(".log")} <= {stage.overlay.name, "b.serial", "b.qmp"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_the_disk_of_a_guest_that_switches_itself_off_is_completed(tmp_path: Path, engine: str) -> None:
    with ending(tmp_path, engine) as stage:
        with stage.run() as run:
            run.wait_for_line(" of 64 MiB", SECONDS)
            with monitor(stage.second_b) as b:
                stage.switch_off(b)
            assert run.wait(SECONDS) == 0, run.output()
        assert (
            "the guest has shut itself down on B (guest-shutdown); its disk is completed without it"
            in run.output()
        )
        assert_complete(stage)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("moment", ["SHUTDOWN", "PIVOTED"])
def test_a_guest_may_be_ended_in_the_last_step(tmp_path: Path, engine: str, moment: str) -> None:
    with ending(tmp_path, engine) as stage:
        stage.change("limits", speed=0)
        with stage.run_doomed(moment, Role.B, number=signal.SIGTERM) as run:
            assert run.wait(SECONDS) == 0, run.output()
        assert ended_by_signal(run.output()), run.output()
        assert_complete(stage)


@pytest.mark.parametrize("moment", ["ARRIVED", "STREAM", "PROGRESS"])
def test_a_qemu_that_is_told_to_end_while_the_disk_follows_is_no_crash(tmp_path: Path, moment: str) -> None:
    with ending(tmp_path, "overlay") as stage:
        with stage.run_doomed(moment, Role.B, number=signal.SIGTERM) as run:
            assert run.wait(SECONDS) == 0, run.output()
        assert ended_by_signal(run.output(), "its disk is completed without it"), run.output()
        assert_complete(stage)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_qemu_that_stays_when_its_guest_is_off_pivots_as_always(tmp_path: Path, engine: str) -> None:
    with ending(tmp_path, engine, "-no-shutdown") as stage:
        with stage.run() as run:
            run.wait_for_line(" of 64 MiB", SECONDS)
            with monitor(stage.second_b) as b:
                stage.switch_off(b)
                wait_until(lambda: b.state == "shutdown", "the guest is off", SECONDS)
            assert run.wait(SECONDS) == 0, run.output()
        assert stage.started() == {Role.B}
        with monitor(stage.monitor_b) as b:
            assert "nbd" not in {each["drv"] for each in b.execute("query-named-block-nodes", flat=True)}
            # Who switches it on again finds its disk.
            b.execute("system_reset")
            b.execute("cont")
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert_complete(stage)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.sampled(1)
def test_a_crash_in_the_last_step_is_told_and_everything_else_is_done(tmp_path: Path, engine: str) -> None:
    for moment in ("SHUTDOWN", "PIVOTED"):
        directory = tmp_path / moment
        directory.mkdir()
        with ending(directory, engine) as stage:
            stage.change("limits", speed=0)
            with stage.run_doomed(moment, Role.B) as run:
                assert run.wait(SECONDS) == 1, run.output()
            last = run.output().splitlines()[-1]
            assert "B's QEMU was ended by signal 9; the guest has stopped; its disk" in last
            assert "is complete and needs nothing on A" in last
            assert_complete(stage)


def test_a_guest_that_switches_itself_off_on_a_is_no_crash_either(tmp_path: Path) -> None:
    with ending(tmp_path, "overlay") as stage:
        with monitor(stage.second) as a:
            a.execute("migrate-set-parameters", max_bandwidth=4096, downtime_limit=1)
        with stage.run() as run, monitor(stage.second) as a:
            wait_until(lambda: a.execute("query-migrate").get("status") == "active", "the RAM moves", SECONDS)
            stage.switch_off(a)
            assert run.wait(SECONDS) == 1, run.output()
        last = run.output().splitlines()[-1]
        assert last.endswith("the guest has shut itself down on A (guest-shutdown); its disk is untouched")
        assert stage.started() == set()
        assert not stage.overlay.exists()


def test_nbd_overlay_that_dies_in_the_last_step_leaves_nothing(tmp_path: Path) -> None:
    for moment in ("SHUTDOWN", "PIVOTED"):
        directory = tmp_path / moment
        directory.mkdir()
        with ending(directory, "overlay") as stage:
            stage.change("limits", speed=0, reconnect_delay=1)
            with stage.run_doomed(moment, Role.OVERLAY) as run:
                assert run.wait(SECONDS) == 0, run.output()
            stage.wait_until_guest_works("b")
            stage.quit_b()
            assert_complete(stage)
