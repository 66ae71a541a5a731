"""An orchestrator that is stopped itself for longer than its limits: that costs only time."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.processes import Process, wait_until
from tests.support.vms import Role, Scene, monitor, scene

LIMIT = 6.0
"""Seconds; more than anything here takes, even on a busy machine."""

STOP = LIMIT + 1.0
"""Seconds for which the orchestrator is stopped."""


SUPERVISORS = (Role.SUPERVISOR_OF_B, Role.SUPERVISOR_OF_OVERLAY, Role.SUPERVISOR_OF_SERVER)


def stop_for_long(run: Process) -> None:
    """Stop the orchestrator, as Ctrl-Z or a debugger does, and let it go on."""
    run.signal(signal.SIGSTOP)
    stopped = psutil.STATUS_STOPPED
    wait_until(lambda: psutil.Process(run.pid).status() == stopped, "it is stopped")
    time.sleep(STOP)
    run.signal(signal.SIGCONT)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "lines", [("step 1", "step 3"), ("step 2", "step 4"), ("stands still on A", " of 64 MiB"), ("step 6",)]
)
def test_the_time_in_which_the_orchestrator_was_stopped_does_not_count(
    tmp_path: Path, lines: tuple[str, ...]
) -> None:
    with scene(tmp_path) as stage:
        forgive_little(stage)
        with stage.run() as run:
            for line in lines:
                run.wait_for_line(line, 30.0)
                stop_for_long(run)
            assert run.wait(60.0) == 0, run.output()
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors() == []


@pytest.mark.sampled(1)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_supervisor_that_was_stopped_is_in_nobodys_way_back(tmp_path: Path, number: signal.Signals) -> None:
    with scene(tmp_path) as stage:
        with monitor(stage.monitor_a) as a:
            # So that the RAM is on its way for long enough.
            a.execute("migrate-set-parameters", max_bandwidth=1 << 16)
        with stage.run() as run:
            run.wait_for_line("step 4", 30.0)
            supervisors = [supervisor for role in SUPERVISORS for supervisor in role.find(stage.directory)]
            assert len(supervisors) == len(SUPERVISORS)
            for supervisor in supervisors:
                supervisor.suspend()
            run.signal(number)
            back = "the guest runs on A as before"
            wait_until(lambda: back in run.output(), back, 90.0)
            assert run.wait(90.0) == (-number if number == signal.SIGKILL else 130)
        wait_until(lambda: stage.started() <= set(SUPERVISORS), "all but the supervisors have ended")
        assert not stage.overlay.exists()
        stage.wait_until_guest_works("a")
        for supervisor in supervisors:
            with suppress(psutil.NoSuchProcess):
                supervisor.kill()


def test_a_guest_does_not_go_to_a_qemu_that_might_end_with_the_orchestrator(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        with monitor(stage.monitor_a) as a:
            # So that the RAM is on its way for some seconds.
            a.execute("migrate-set-parameters", max_bandwidth=1 << 19)
        with stage.run() as run:
            run.wait_for_line("step 4", 30.0)
            supervisors = Role.SUPERVISOR_OF_B.find(stage.directory)
            assert supervisors
            for supervisor in supervisors:
                supervisor.suspend()
            assert run.wait(90.0) == 1, run.output()
            assert "would not outlive us: its supervisor does not answer" in run.output()
            assert "the guest runs on A as before" in run.output()
        stage.wait_until_guest_works("a")
        for supervisor in supervisors:
            with suppress(psutil.NoSuchProcess):
                supervisor.kill()


def forgive_little(stage: Scene) -> None:
    """Give everything that the orchestrator waits for LIMIT seconds."""
    names = ("connect", "command", "start", "silence", "stall", "recover", "stop")
    stage.change("limits", **dict.fromkeys(names, LIMIT), speed=16 << 20)
