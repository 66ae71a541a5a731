"""The shell recipes where something has ended before its time, with a small guest."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.client import connect
from nbdserve.common.errors import ConnectError
from nbdserve.common.uri import NbdUri
from recipes.qemu.source import HOLDS, SWITCHES, migration_status
from recipes.qemu.vm import VmSilentError
from recipes.qemu.vm import connect as connect_monitor
from tests.support.pasting import after, pasted_well
from tests.support.processes import wait_until
from tests.support.recipes import Operator
from tests.support.servers import free_tcp_address
from tests.support.vms import Role, Scene, TwoMonitors, lives, monitor, running, scene

SECONDS = 60.0
MIB = 1 << 20


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    """A guest that runs on A."""
    with scene(tmp_path, "qemu") as made:
        yield made


def operator_of(stage: Scene) -> Operator:
    """Whoever migrates it by hand."""
    directory = stage.directory
    return Operator(
        {
            "DISK": str(stage.image),
            "OVERLAY": str(stage.overlay),
            "NBD_ADDRESS": "127.0.0.1",
            "NBD_PORT": str(free_tcp_address().port),
            "NBD_PID_FILE": str(directory / "server.pid"),
            "FENCE_FILE": str(directory / "fence.pid"),
            "SOURCE_QMP": str(stage.monitor_a),
            "DESTINATION_QMP": str(stage.monitor_b),
            "DESTINATION_PID_FILE": str(directory / "b.pid"),
            "RECONNECT_DELAY": "1",
            "MIGRATION": f"unix:{directory / 'migration'}",
            "MOVE_TO": str(stage.moved),
            "XDG_RUNTIME_DIR": str(directory),
        }
    )


def moved(stage: Scene) -> Operator:
    """Steps 1 to 4: the guest runs on B."""
    operator = operator_of(stage)
    operator.must(1)
    operator.must(2)
    operator.must(3, *stage.plan.destination.qemu)
    operator.must(4)
    stage.wait_until_guest_works("b")
    return operator


def end(stage: Scene, role: Role) -> None:
    """Kill what is in this role."""
    found = role.find(stage.directory)
    assert found
    for process in found:
        process.kill()
        wait_until(lambda pid=process.pid: not lives(pid), "it is dead")  # type: ignore[misc]


def test_a_server_and_a_fence_that_have_ended_are_no_obstacle(stage: Scene) -> None:
    operator = moved(stage)
    operator.must(5)
    for name in ("NBD_PID_FILE", "FENCE_FILE"):
        os.kill(int(Path(operator.variables[name]).read_text()), signal.SIGTERM)
        wait_until(lambda name=name: not Path(operator.variables[name]).exists(), "it has ended")  # type: ignore[misc]
    assert f"{stage.image} is now {stage.moved}" in operator.must(6)
    assert stage.started() == {Role.B}
    stage.quit_b()
    assert stage.wrong_sectors() == []


def test_a_server_that_was_killed_is_no_obstacle(stage: Scene) -> None:
    operator = moved(stage)
    operator.must(5)
    end(stage, Role.SERVER)
    assert f"{stage.image} is now {stage.moved}" in operator.must(6)
    assert stage.started() == {Role.B}


def test_a_server_whose_pid_file_is_not_where_it_is_looked_for_is_named(stage: Scene) -> None:
    operator = moved(stage)
    operator.must(5)
    elsewhere = str(stage.directory / "elsewhere")
    for name in ("NBD_PID_FILE", "FENCE_FILE"):
        pid = int(Path(operator.variables[name]).read_text())
        line = operator.fails(6, **{name: elsewhere})
        assert f"{name}: process {pid} is not that of {elsewhere}, but works with {stage.image}" in line
        assert lives(pid)
    operator.must(6)
    assert stage.started() == {Role.B}


def test_a_server_that_somebody_uses_is_not_ended(stage: Scene) -> None:
    operator = moved(stage)
    operator.must(5)
    uri = NbdUri(host="127.0.0.1", port=int(operator.variables["NBD_PORT"]), export="disk")
    with connect(uri):
        assert "the server still has clients" in operator.fails(6)
        assert Role.SERVER.find(stage.directory)
        assert stage.image.exists()
    operator.must(6)


def test_the_disk_of_a_guest_that_has_ended_on_b_is_completed_without_it(stage: Scene) -> None:
    operator = moved(stage)
    end(stage, Role.B)
    line = operator.fails(5)
    assert "DESTINATION_QMP=ended" in line
    # B's QEMU cannot be asked, but whoever copies can be seen.
    assert "every block is local in" in operator.must(5, DESTINATION_QMP="ended")
    # It may be run again.
    operator.must(5, DESTINATION_QMP="ended")
    assert f"{stage.image} is now {stage.moved}" in operator.must(6, DESTINATION_QMP="ended")
    assert stage.started() == set()
    assert stage.wrong_sectors(interrupted=True) == []
    assert not list(stage.directory.glob("stream.*"))


def test_step_5_does_not_meddle_with_nbd_overlay(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        stage.change("limits", speed=8 * MIB)
        with stage.run_doomed("PROGRESS", Role.ORCHESTRATOR) as run:
            assert run.wait(SECONDS) == -signal.SIGKILL
        line = operator_of(stage).fails(5)
        assert "disk0 is served by nbd-overlay" in line
        assert "nbd-migrate finish" in line
        pasted_well(f"nbd-migrate finish {stage.plan_file()}")


def test_what_a_run_has_started_and_what_its_messages_start_step_6_ends(stage: Scene) -> None:
    """The server that was started by hand, too, as the message about the first one's end says."""
    stage.change("limits", speed=8 * MIB, restarts=0, reconnect_delay=1)
    with stage.run_doomed("PROGRESS", Role.SERVER) as run:
        assert run.wait(SECONDS) == 1
    pasted_well(after("see that this runs on A", run.output()))
    files = {
        "SOURCE_QMP": "ended",
        "NBD_PID_FILE": f"{stage.image}.nbdserve.pid",
        "FENCE_FILE": f"{stage.image}.fence.pid",
    }
    operator = operator_of(stage)
    operator.must(5, **files)
    operator.must(6, **files)
    assert stage.started() == {Role.B}
    stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == []


@pytest.mark.representative
def test_step_4_does_not_cancel_a_switch_over(tmp_path: Path) -> None:
    """B's QEMU, which hangs there, may have all of the guest, and runs it when it goes on."""
    stage = TwoMonitors(tmp_path, "qemu")
    with running(stage):
        operator = operator_of(stage)
        operator.must(1)
        operator.must(2)
        operator.must(3, *stage.plan.destination.qemu)
        (b,) = Role.B.find(stage.directory)
        with operator.start(4, stage.directory / "migrate.log") as migrating:
            wait_until(lambda: status_of(stage) == HOLDS, "the switch-over", SECONDS, 0.01)
            b.suspend()
            wait_until(lambda: status_of(stage) in (SWITCHES, SILENT), "it is continued", SECONDS)
            migrating.signal(signal.SIGTERM)
            time.sleep(3.0)
            assert status_of(stage) in (SWITCHES, SILENT), "nobody has cancelled it"
            assert migrating.running
            b.resume()
            assert migrating.wait(SECONDS) == 1
            assert "interrupted, but the guest had arrived: it runs on B" in migrating.output()
        stage.wait_until_guest_works("b")
        with monitor(stage.second) as a:
            assert a.state == "postmigrate"
        os.kill(int(Path(operator.variables["FENCE_FILE"]).read_text()), signal.SIGTERM)


def status_of(stage: TwoMonitors) -> str:
    """What A's QEMU says of its migration; it may not answer while B's takes nothing."""

    async def ask() -> str:
        a = await connect_monitor("A's QEMU", str(stage.second), limit=2.0, command_limit=2.0)
        try:
            return await migration_status(a)
        finally:
            await a.disconnect()

    try:
        return asyncio.run(ask())
    except (ConnectError, VmSilentError):
        return SILENT


SILENT = "silent"
