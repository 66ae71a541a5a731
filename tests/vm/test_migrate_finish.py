"""nbd-migrate finish: after the cut-over one command does what is left, whatever has died and whenever."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.pasting import after, paste, pasted_well
from tests.support.processes import Process, wait_until
from tests.support.vms import NBD_MIGRATE, Role, Scene, monitor, scene

SECONDS = 60.0
"""More than any of these migrations takes, even on a busy machine."""

AWAY = """#!/bin/bash
# An ssh to a host that is away while a file exists.
shift
if [ -e {away} ]; then
    echo "ssh: connect to host a port 22: No route to host" >&2
    exit 255
fi
set -o pipefail
cat | bash -c "$*" | cat
"""

ENGINES = ("overlay", "qemu")
MIB = 1 << 20


def assert_finished(stage: Scene, guest: Role | None = Role.B) -> None:
    """The guest works on B on its own disk, which is complete, and nothing else is left but logs."""
    wait_until(lambda: stage.started() == {guest} - {None}, "all else has ended", 30.0)
    if guest:
        stage.wait_until_guest_works("b")
        with monitor(stage.monitor_b) as b:
            assert "nbd" not in {each["drv"] for each in b.execute("query-named-block-nodes", flat=True)}
        stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == []
    names = {path.name for path in stage.directory.iterdir() if path.suffix != ".log"}
    own = {"a.moved", "a.qmp", "a.serial", "b.serial", "b.qmp", "plan.toml", "migration", stage.overlay.name}
    assert names - own <= {"nbd"}, "a socket whose server was killed is in nobody's way"
    assert stage.moved.exists()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("moment", ["ARRIVED", "STREAM", "PROGRESS", "SHUTDOWN", "PIVOTED"])
@pytest.mark.representative
def test_what_the_guard_says_finishes_a_migration_whose_orchestrator_was_killed(
    tmp_path: Path, engine: str, moment: str
) -> None:
    with scene(tmp_path, engine) as stage:
        stage.change("limits", speed=32 * MIB)
        with stage.run_doomed(moment, Role.ORCHESTRATOR) as run:
            assert run.wait(SECONDS) == -signal.SIGKILL
            wait_until(lambda: not Role.GUARD.find(stage.directory), "the guard ends", 30.0)
            said = run.output()
        stage.wait_until_guest_works("b")
        if moment == "ARRIVED":
            # Later the guard is gone, and there is nobody who could say anything.
            command = after("to complete it", said)
        else:
            command = f"nbd-migrate finish {stage.directory / 'plan.toml'}"
        assert f"{stage.overlay}" in pasted_well(command)
        # It may be repeated.
        pasted_well(command)
        assert_finished(stage)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("moment", ["PROGRESS", "SHUTDOWN"])
def test_what_an_interrupted_run_says_finishes_it(tmp_path: Path, engine: str, moment: str) -> None:
    with scene(tmp_path, engine) as stage:
        stage.change("limits", speed=32 * MIB)
        with stage.run_doomed(moment, Role.ORCHESTRATOR, number=signal.SIGTERM) as run:
            assert run.wait(SECONDS) == 130, run.output()
            said = run.output()
        words = "to complete it" if moment == "PROGRESS" else "to clear away what is left"
        pasted_well(after(words, said))
        assert_finished(stage)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("engine", "victims"),
    [
        ("overlay", (Role.SERVER,)),
        ("overlay", (Role.OVERLAY,)),
        ("overlay", (Role.FENCE, Role.SUPERVISOR_OF_B)),
        ("overlay", (Role.SERVER, Role.OVERLAY, Role.FENCE)),
        ("qemu", (Role.SERVER,)),
        ("qemu", (Role.SERVER, Role.FENCE)),
    ],
)
@pytest.mark.representative
def test_what_died_with_the_orchestrator_is_started_again(
    tmp_path: Path, engine: str, victims: tuple[Role, ...]
) -> None:
    with scene(tmp_path, engine) as stage:
        stage.change("limits", speed=16 * MIB)
        with stage.run_doomed("PROGRESS", Role.ORCHESTRATOR, *victims) as run:
            assert run.wait(SECONDS) == -signal.SIGKILL
        pasted_well(f"nbd-migrate finish {stage.directory / 'plan.toml'}")
        assert_finished(stage)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("boot", [False, True])
@pytest.mark.representative
def test_the_disk_of_a_guest_whose_qemu_died_is_completed_with_or_without_it(
    tmp_path: Path, engine: str, boot: bool
) -> None:
    with scene(tmp_path, engine) as stage:
        stage.change("limits", speed=16 * MIB)
        with stage.run_doomed("PROGRESS", Role.B) as run:
            assert run.wait(SECONDS) == 1, run.output()
            said = run.output()
        assert "B's QEMU was ended by signal 9" in said
        words = (
            "to start the guest again and complete its disk" if boot else "to complete the disk without it"
        )
        pasted_well(after(words, said))
        assert_finished(stage, Role.B_AGAIN if boot else None)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_guest_is_started_again_on_a_disk_that_was_completed_without_it(
    tmp_path: Path, engine: str
) -> None:
    with scene(tmp_path, engine) as stage:
        with stage.run_doomed("SHUTDOWN", Role.B) as run:
            assert run.wait(SECONDS) == 1, run.output()
            said = run.output()
        assert "step 6" in said.splitlines()[-1]
        assert "B's QEMU was ended by signal 9" in said.splitlines()[-1]
        pasted_well(after("to start it again", said))
        assert_finished(stage, Role.B_AGAIN)


@pytest.mark.parametrize("boot", [False, True])
def test_a_complete_disk_whose_guest_and_orchestrator_have_died_is_all_that_a_guest_needs(
    tmp_path: Path, boot: bool
) -> None:
    with scene(tmp_path) as stage:
        with stage.run_doomed("SHUTDOWN", Role.ORCHESTRATOR, Role.B) as run:
            assert run.wait(SECONDS) == -signal.SIGKILL
        pasted_well(f"nbd-migrate finish {'--boot ' * boot}{stage.directory / 'plan.toml'}")
        assert_finished(stage, Role.B_AGAIN if boot else None)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_complete_disk_is_the_guests_own_although_a_is_away(tmp_path: Path, engine: str) -> None:
    directory, away, ssh = tmp_path / "scene", tmp_path / "away", tmp_path / "ssh"
    directory.mkdir()
    ssh.write_text(AWAY.format(away=away))
    ssh.chmod(0o755)
    with scene(directory, engine) as stage:
        stage.change("source", shell=(str(ssh), "a"), bin=str(NBD_MIGRATE.parent))
        with stage.run_doomed("SHUTDOWN", Role.ORCHESTRATOR) as run:
            assert run.wait(SECONDS) == -signal.SIGKILL
        away.touch()
        command = f"nbd-migrate finish {stage.directory / 'plan.toml'}"
        done = paste(command)
        assert done.returncode == 1, done
        last = done.stderr.splitlines()[-1]
        assert "No route to host" in last
        assert "is complete and needs nothing on A; to clear away what is left: " in last
        stage.wait_until_guest_works("b")
        with monitor(stage.monitor_b) as b:
            assert "nbd" not in {each["drv"] for each in b.execute("query-named-block-nodes", flat=True)}
        away.unlink()
        pasted_well(after("to clear away what is left", last))
        assert_finished(stage)


@pytest.mark.representative
def test_a_guest_that_is_on_a_is_not_touched(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        plan = stage.plan_file()
        done = paste(f"nbd-migrate finish {plan}")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
        assert (
            "the guest is on A, in state running, and there is nothing to finish: run the plan again"
            in done.stderr
        )
        stage.wait_until_guest_works("a")
        assert stage.started() == set()


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    with scene(tmp_path) as stage:
        stage.change("limits", speed=MIB, connect=1.0)
        with stage.run() as run:
            run.wait_for_line(" of 64 MiB", SECONDS)
            done = paste(f"nbd-migrate finish {stage.directory / 'plan.toml'}")
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
            assert f"process {run.pid} is at work on this migration already" in done.stderr
            with monitor(Path(f"{stage.overlay}.qmp")) as overlay:
                overlay.execute("block-job-set-speed", device="stream", speed=0)
            assert run.wait(SECONDS) == 0, run.output()
        assert_finished(stage)


@pytest.mark.parametrize("complete", [False, True])
def test_somebody_who_writes_to_the_old_disk_is_not_overlooked(tmp_path: Path, complete: bool) -> None:
    """As a guest does that was started on A again, when nothing kept it from that."""
    with scene(tmp_path) as stage:
        stage.change("limits", speed=0 if complete else MIB)
        with stage.run_doomed("SHUTDOWN" if complete else "PROGRESS", Role.ORCHESTRATOR, Role.FENCE) as run:
            assert run.wait(SECONDS) == -signal.SIGKILL
        argv = [word.replace(str(stage.image), str(stage.away)) for word in stage.source_qemu()]
        with Process(argv, stage.directory / "again.log") as again:
            stage.wait_until_guest_works("a")
            # Its monitor is another one, of which the plan does not know.
            stage.change("source", qmp=str(stage.directory / "other.qmp"))
            done = paste(f"nbd-migrate finish {stage.plan_file()}")
            assert again.running
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done
        assert "the image is in use: another process is writing to it" in done.stderr
        assert stage.away.exists()
        stage.wait_until_guest_works("b")


@pytest.mark.parametrize("engine", ENGINES)
def test_the_wrong_engine_is_refused(tmp_path: Path, engine: str) -> None:
    with scene(tmp_path, engine) as stage:
        stage.change("limits", speed=8 * MIB)
        with stage.run_doomed("PROGRESS", Role.ORCHESTRATOR) as run:
            assert run.wait(SECONDS) == -signal.SIGKILL
        wrong = "qemu" if engine == "overlay" else "overlay"
        done = paste(f"nbd-migrate finish --engine {wrong} --speed 0 {stage.directory / 'plan.toml'}")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
        assert f"give --engine {engine}, as the run was given" in done.stderr
        pasted_well(f"nbd-migrate finish --engine {engine} --speed 0 {stage.directory / 'plan.toml'}")
        assert_finished(stage)


def test_a_guest_whose_monitor_is_somewhere_else_keeps_its_disk(tmp_path: Path) -> None:
    """It is taken for one that has ended; but who uses the disk can be seen."""
    with scene(tmp_path) as stage:
        stage.change("limits", speed=16 * MIB)
        with stage.run_doomed("PROGRESS", Role.ORCHESTRATOR) as run:
            assert run.wait(SECONDS) == -signal.SIGKILL
        stage.change("destination", qmp=str(stage.directory / "other.qmp"))
        done = paste(f"nbd-migrate finish {stage.plan_file()}")
        assert done.returncode == 1, done
        assert "a guest uses the disk (clients: 1)" in done.stderr.splitlines()[-1]
        stage.wait_until_guest_works("b")
        stage.change("destination", qmp=str(stage.monitor_b))
        pasted_well(f"nbd-migrate finish {stage.plan_file()}")
        assert_finished(stage)
