"""No two processes' death loses a guest, whoever they are and whenever around the switch-over they die."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nbdserve.common.errors import ConnectError
from recipes.qemu.source import SWITCHES, migration_status
from recipes.qemu.vm import VmSilentError, connect
from tests.support.processes import Process, wait_until
from tests.support.vms import Role, Scene, TwoMonitors, lives, monitor, running

SECONDS = 60.0
"""More than any of these migrations takes, even on a busy machine."""

OTHERS = (
    Role.CHIEF,
    Role.DEPUTY,
    Role.SERVER,
    Role.OVERLAY,
    Role.SUPERVISOR_OF_SERVER,
    Role.SUPERVISOR_OF_OVERLAY,
    Role.SUPERVISOR_OF_B,
)
"""Who may die together with the orchestrator."""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[TwoMonitors]:
    """A guest that runs on A, whose QEMU can be asked while an orchestrator is connected to it."""
    made = TwoMonitors(tmp_path)
    with running(made):
        yield made


@pytest.mark.sampled(2)
@pytest.mark.parametrize("other", OTHERS)
def test_before_the_switch_over_the_guest_runs_on_on_a(stage: TwoMonitors, other: Role) -> None:
    with stage.run_doomed("SWITCHOVER", Role.ORCHESTRATOR, other) as run:
        assert run.wait(SECONDS) == -signal.SIGKILL
        wait_until(lambda: "the guest runs on A as before" in run.output(), "the way back", 30.0)
    wait_until(lambda: not stage.started(), "everything that was started has ended", 30.0)
    assert not stage.overlay.exists()
    stage.wait_until_guest_works("a")
    assert stage.capabilities_of_a() == []


@pytest.mark.sampled(1)
@pytest.mark.parametrize("others", [*((other,) for other in OTHERS), (Role.CHIEF, Role.DEPUTY)])
@pytest.mark.representative
def test_in_the_switch_over_the_guest_comes_to_b(stage: TwoMonitors, others: tuple[Role, ...]) -> None:
    """B's QEMU stands still until they are dead, and then takes the guest up; even if three are."""
    with stage.run_doomed("SWITCHOVER", Role.B, number=signal.SIGSTOP) as run:
        # Before, a QEMU that is silent is only slow.
        run.wait_for_line("stands still on A", 30.0)
        wait_until(lambda: is_switching(stage), "the switch-over", 30.0)
        kill(run, *(process for other in others for process in other.find(stage.directory)))
        for process in Role.B.find(stage.directory):
            process.send_signal(signal.SIGCONT)
        if len(others) == 1:
            wait_until(lambda: "the guest runs on B" in run.output(), "the guard", 30.0)
    assert_on_b(stage)
    if len(others) > 1:
        with monitor(stage.second) as a:
            assert a.state == "postmigrate"


def is_switching(stage: TwoMonitors) -> bool:
    """Whether A's QEMU is in the switch-over; it does not answer where B's does not take what is left."""

    async def ask() -> bool:
        a = await connect("A's QEMU", str(stage.second), limit=2.0, command_limit=2.0)
        try:
            return await migration_status(a) == SWITCHES
        finally:
            await a.disconnect()

    try:
        return asyncio.run(ask())
    except (ConnectError, VmSilentError):
        return True


def kill(run: Process, *others: psutil.Process) -> None:
    """Kill the orchestrator and others, as good as at once."""
    for process in (psutil.Process(run.pid), *others):
        process.kill()
    run.wait()
    wait_until(lambda: not any(lives(other.pid) for other in others), "they are dead")


def assert_on_b(stage: Scene) -> None:
    """The guest works on B, unless its disk was taken away: then it waits, and nothing is lost."""
    with monitor(stage.monitor_b) as b:
        wait_until(lambda: b.state in ("running", "io-error"), "the guest is on B", 30.0)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("engine", "disk"), [("overlay", Role.OVERLAY), ("qemu", Role.SERVER)])
def test_a_guest_that_comes_to_b_without_its_disk_waits_for_it(
    tmp_path: Path, engine: str, disk: Role
) -> None:
    """Its first request is an error, so that it may never be seen to run before that."""
    stage = TwoMonitors(tmp_path, engine)
    stage.change("limits", reconnect_delay=0)
    with running(stage):
        with stage.run_doomed("SWITCHOVER", Role.B, number=signal.SIGSTOP) as run:
            run.wait_for_line("stands still on A", 30.0)
            wait_until(lambda: is_switching(stage), "the switch-over", 30.0)
            for process in disk.find(tmp_path):
                process.kill()
            for process in Role.B.find(tmp_path):
                process.resume()
            assert run.wait(SECONDS) == 0, run.output()
        stage.wait_until_guest_works("b")
        stage.quit_b()
        assert stage.wrong_sectors(interrupted=True) == []
