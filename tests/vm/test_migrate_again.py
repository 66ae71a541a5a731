"""Whatever dies in whichever step before the cut-over: the same plan runs again, without any cleaning up."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.processes import wait_until
from tests.support.vms import NBD_MIGRATE, Role, Scene, scene

SECONDS = 60.0
"""More than any of these migrations takes, even on a busy machine."""

ENGINES = ("overlay", "qemu")

KILLS: dict[Role, tuple[str, ...]] = {
    Role.ORCHESTRATOR: ("SWITCHOVER", "MIGRATE", "LAUNCH", "OVERLAY", "EXPORT"),
    Role.CHIEF: ("MIGRATE", "LAUNCH", "OVERLAY", "EXPORT"),
    Role.DEPUTY: ("MIGRATE", "LAUNCH", "OVERLAY", "EXPORT"),
    Role.SERVER: ("MIGRATE", "LAUNCH", "OVERLAY"),
    Role.SUPERVISOR_OF_SERVER: ("MIGRATE", "LAUNCH", "OVERLAY"),
    Role.OVERLAY: ("MIGRATE",),
    Role.SUPERVISOR_OF_OVERLAY: ("MIGRATE",),
    Role.B: ("SWITCHOVER", "MIGRATE"),
    Role.SUPERVISOR_OF_B: ("SWITCHOVER", "MIGRATE"),
}
"""Who is killed, and when; the latest first, so that the next run proves that nothing is in the way of it."""

TABLE = [
    (engine, victim)
    for engine in ENGINES
    for victim in KILLS
    if engine == "overlay" or victim not in (Role.OVERLAY, Role.SUPERVISOR_OF_OVERLAY)
]


def left_behind(stage: Scene) -> set[str]:
    """What a migration has left in the scene's directory, but its logs."""
    own = {"a.raw", "a.qmp", "a.serial", "b.serial", "plan.toml", "bin"}
    names = {path.name for path in stage.directory.iterdir() if path.suffix != ".log"}
    return names - own


def assert_as_before(stage: Scene) -> None:
    """Nothing is left of the migration, and the guest works on A."""
    wait_until(lambda: not stage.started(), "everything that was started has ended", 30.0)
    # Sockets whose owner was killed: nobody listens there, and the next one takes their place.
    assert left_behind(stage) <= {"nbd", "b.qmp", "migration"}
    stage.wait_until_guest_works("a")


def assert_moves(stage: Scene) -> None:
    """The same plan moves the guest, and nothing else is left than what it is about."""
    with stage.run() as run:
        assert run.wait(SECONDS) == 0, run.output()
    stage.wait_until_guest_works("b")
    stage.wait_until_only({Role.B})
    stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == []
    assert left_behind(stage) - {"b.qmp", "migration"} == {"a.moved", stage.overlay.name}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("engine", "victim"), TABLE)
@pytest.mark.representative
def test_a_plan_runs_again_after_any_death(tmp_path: Path, engine: str, victim: Role) -> None:
    with scene(tmp_path, engine) as stage:
        for moment in KILLS[victim]:
            with stage.run_doomed(moment, victim) as run:
                status = run.wait(SECONDS)
                assert status == (-signal.SIGKILL if victim is Role.ORCHESTRATOR else 1), run.output()
                wait_until(lambda: "the guest runs on A as before" in run.output(), "the way back", 30.0)
            assert_as_before(stage)
            run.log.unlink()
        assert_moves(stage)


CREATE = """#!/bin/bash
# nbd-overlay, which kills the orchestrator when it creates an image.
kill_orchestrator() {{
    until [ -s {directory}/orchestrator ]; do sleep 0.01; done
    kill -9 $(cat {directory}/orchestrator)
}}
if [ "$1" = create ] && [ ! -e {directory}/killed ]; then
    touch {directory}/killed
    [ {when} != before ] || kill_orchestrator
    {real} "$@"
    status=$?
    [ {when} != after ] || kill_orchestrator
    exit $status
fi
exec {real} "$@"
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_image_that_is_made_while_the_orchestrator_dies_is_not_left(
    tmp_path: Path, engine: str, when: str
) -> None:
    directory = tmp_path / "scene"
    directory.mkdir()
    with scene(directory, engine) as stage:
        tool = tmp_path / "bin" / "nbd-overlay"
        tool.parent.mkdir()
        real = NBD_MIGRATE.with_name("nbd-overlay")
        tool.write_text(CREATE.format(directory=tmp_path, when=when, real=real))
        tool.chmod(0o755)
        stage.change("destination", bin=str(tool.parent))
        with stage.run() as run:
            (tmp_path / "orchestrator").write_text(f"{run.pid}\n")
            assert run.wait(SECONDS) == -signal.SIGKILL, run.output()
            wait_until(lambda: "the guest runs on A as before" in run.output(), "the way back", 30.0)
        assert_as_before(stage)
        assert_moves(stage)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_that_somebody_else_makes_meanwhile_is_not_removed(tmp_path: Path, engine: str) -> None:
    directory = tmp_path / "scene"
    directory.mkdir()
    with scene(directory, engine) as stage:
        tool = tmp_path / "bin" / "nbd-overlay"
        tool.parent.mkdir()
        real = NBD_MIGRATE.with_name("nbd-overlay")
        tool.write_text(f'#!/bin/sh\n[ "$1" != create ] || echo mine >{stage.overlay}\nexec {real} "$@"\n')
        tool.chmod(0o755)
        stage.change("destination", bin=str(tool.parent))
        with stage.run() as run:
            assert run.wait(SECONDS) == 1, run.output()
        assert f"{stage.overlay}: the file exists" in run.output()
        assert run.output().splitlines()[-1].endswith("the guest runs on A as before")
        assert stage.overlay.read_text() == "mine\n"
        stage.wait_until_guest_works("a")
