"""A's old disk is out of reach for as long as it takes, also when A was switched off in between."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from nbdserve.exports.moved_images import Standing, marker_beside, read_marker
from recipes.migrate import journal
from tests.support.disks import MIB
from tests.support.killed import NAME, command
from tests.support.pasting import after, pasted_well
from tests.support.processes import Process, listens, wait_until
from tests.support.vms import Role, Scene, monitor, running
from tests.vm.test_migrate_advice import tools
from tests.vm.test_migrate_finish import AWAY

SECONDS = 120.0
OF_A = (Role.SERVER, Role.SUPERVISOR_OF_SERVER, Role.FENCE)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    """A guest that runs on A, whose disk follows it slowly."""
    made = Scene(tmp_path)
    made.change("limits", speed=8 * MIB)
    with running(made):
        yield made


def kill(role: Role, stage: Scene) -> None:
    """All in this role die; one may go with another."""
    for process in role.find(stage.directory):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def switch_off_a(stage: Scene) -> None:
    """All that runs on A dies, and with it who drives the migration there."""
    for role in (Role.ORCHESTRATOR, Role.GUARD, *OF_A):
        kill(role, stage)
    wait_until(lambda: not any(role.find(stage.directory) for role in OF_A), "A is switched off", SECONDS)


def starts_on_a(stage: Scene) -> str:
    """What becomes of A's guest when something there starts it as it was started; it must not run."""
    stage.monitor_a.unlink(missing_ok=True)
    with Process(stage.source_qemu(), stage.directory / "again.log") as again:
        assert again.wait(SECONDS) != 0, "A's guest runs a second time"
        return again.output()


def streaming(stage: Scene, *options: str) -> None:
    """The guest is on B, part of its disk is not, and A was switched off meanwhile."""
    with stage.run("--name", NAME, *options) as run:
        run.wait_for_line(" of 64 MiB", SECONDS)
        switch_off_a(stage)
        run.wait(SECONDS)


@pytest.mark.representative
def test_after_a_reboot_of_a_nothing_starts_its_guest_and_the_migration_goes_on(stage: Scene) -> None:
    streaming(stage)
    assert "No such file or directory" in starts_on_a(stage)
    assert read_marker(marker_beside(stage.image)).standing is Standing.NEEDED
    code, said = command("resume", NAME)
    assert code == 0, said
    stage.wait_until_guest_works("b")
    assert stage.moved.exists()
    assert not marker_beside(stage.image).exists()
    stage.quit_b()
    assert stage.wrong_sectors() == []


def test_an_image_that_is_not_moved_aside_stays_out_of_reach_when_all_is_done(stage: Scene) -> None:
    stage.change("limits", speed=0)
    stage.change("finish", move_aside="")
    with stage.run("--name", NAME) as run:
        assert run.wait(SECONDS) == 0, run.output()
    assert f"{stage.image} is {stage.away} now, out of date" in run.output()
    assert "No such file or directory" in starts_on_a(stage)
    assert read_marker(marker_beside(stage.image)).standing is Standing.OUT_OF_DATE
    code, said = command("fence", "--lift", str(stage.image), "--yes")
    assert (code, "the guest runs on B" in said) == (1, True), said
    stage.quit_b()
    assert stage.wrong_sectors() == []


STRUCK = """
tracer="strace -qq -o /dev/null -P {path} -e trace={call} -e inject={call}:signal=KILL"
[ "$1" = fence ] || tracer=
exec $tracer {{real}} "$@"
"""
"""A nbd-migrate whose fence is killed in this call on this path."""


@pytest.mark.parametrize("call", ["rename", "renameat2"])
def test_a_fence_that_is_killed_before_it_has_moved_the_image_is_made_up_for_by_the_end(
    stage: Scene, call: str
) -> None:
    """As its marker, and as the image is renamed; the command tells, and the disk follows the guest."""
    stage.change("limits", speed=0)
    stage.change("finish", move_aside="")
    path = stage.image if call == "renameat2" else f"{marker_beside(stage.image)}.new"
    bin_ = tools(stage.directory / "bin", "nbd-migrate", STRUCK.format(path=path, call=call))
    ssh = stage.directory / "ssh"
    ssh.write_text(AWAY.format(away=stage.directory / "away"))
    ssh.chmod(0o755)
    stage.change("source", shell=(str(ssh), "a"), bin=bin_)
    with stage.run() as run:
        assert run.wait(SECONDS) == 0, run.output()
    assert "no fence:" in run.output()
    assert f"{stage.image} on A keeps its name" in run.output()
    assert f"{stage.image} is {stage.away} now, out of date" in run.output()
    assert not stage.image.exists()
    assert read_marker(marker_beside(stage.image)).standing is Standing.OUT_OF_DATE
    stage.wait_until_guest_works("b")
    stage.quit_b()
    assert stage.wrong_sectors() == []


@pytest.mark.parametrize("moment", ["SWITCHOVER", "ARRIVED"])
def test_the_guard_of_a_killed_command_puts_the_image_out_of_reach(stage: Scene, moment: str) -> None:
    with stage.run_doomed(moment, Role.ORCHESTRATOR) as run:
        assert run.wait(SECONDS) == -signal.SIGKILL
        wait_until(lambda: not Role.GUARD.find(stage.directory), "the guard ends", SECONDS)
    if not stage.away.exists():
        # Before the switch-over the guest is given back to A, which has its disk.
        assert moment == "SWITCHOVER"
        stage.wait_until_guest_works("a")
        return
    switch_off_a(stage)
    assert "No such file or directory" in starts_on_a(stage)
    code, said = command("resume", journal.names()[0])
    assert code == 0, said
    stage.wait_until_guest_works("b")
    stage.quit_b()
    assert stage.wrong_sectors() == []


def test_lifting_the_fence_is_refused_while_b_has_the_guest_and_says_what_is_lost_then(stage: Scene) -> None:
    streaming(stage)
    code, said = command("fence", "--lift", NAME, "--yes")
    assert (code, "the guest runs on B" in said, stage.image.exists()) == (1, True, False), said
    kill(Role.B, stage)
    wait_until(lambda: not Role.B.find(stage.directory), "B's QEMU ends", SECONDS)
    for what in (NAME, str(stage.image)):
        code, said = command("fence", "--lift", what)
        assert (code, "all that the guest has written on B since" in said) == (1, True), said
        assert not stage.image.exists()
    sure = after("to lift the fence all the same", said)
    assert shlex.split(sure) == ["nbd-migrate", "fence", "--lift", NAME, "--yes"]
    pasted_well(sure)
    assert not marker_beside(stage.image).exists()
    stage.monitor_a.unlink(missing_ok=True)
    with Process(stage.source_qemu(), stage.directory / "again.log") as again:
        again.wait_for(lambda: listens(stage.monitor_a), "its monitor")
        stage.wait_until_guest_works("a")
        with monitor(stage.monitor_a) as a:
            assert a.state == "running"
    code, said = command("abort", NAME)
    assert not Role.OVERLAY.find(stage.directory), said


def test_an_image_whose_new_name_somebody_takes_meanwhile_keeps_its_own_and_is_told(stage: Scene) -> None:
    """Nobody serves the stranger, and the image has its marker."""
    stage.change("finish", move_aside="")
    stage.away.write_text("mine")
    with stage.run("--name", NAME) as run:
        assert run.wait(SECONDS) == 1, run.output()
    assert f"{stage.away} exists on A, where the image goes" in run.output()
    stage.away.unlink()
    with stage.run("--name", NAME) as run:
        run.wait_for_line("step 4", SECONDS)
        stage.away.write_text("mine")
        run.wait_for_line(" of 64 MiB", SECONDS)
        for role in OF_A:
            kill(role, stage)
        assert run.wait(SECONDS) == 0, run.output()
    assert f"{stage.image} on A keeps its name: see to it that nothing there starts a guest" in run.output()
    assert f"{stage.image} is out of date: never start a guest on it" in run.output()
    assert stage.away.read_text() == "mine"
    assert read_marker(marker_beside(stage.image)).moved == ""
    stage.quit_b()
    assert stage.wrong_sectors() == []
