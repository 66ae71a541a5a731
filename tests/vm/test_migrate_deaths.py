"""Any process killed at any step of nbd-migrate run: what is said, what is left, and where the guest is."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import wait_until
from tests.support.recipes import Operator
from tests.support.vms import NBD_MIGRATE, Role, Scene, monitor, scene

SECONDS = 20.0
"""More than any of these migrations takes, with its failure, even on a busy machine."""

QED_ABORTS = "Assertion `s->allocating_acb == NULL' failed"

BEFORE = ("EXPORT", "OVERLAY", "LAUNCH", "MIGRATE", "SWITCHOVER")
"""The moments at which the guest is still A's."""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Scene]:
    """A guest that runs on A, and a plan in which B's QEMU copies its disk."""
    with scene(tmp_path, "qemu") as made:
        yield made


def assert_as_before(stage: Scene) -> None:
    """Nothing is left of the migration, and the guest works on A."""
    wait_until(lambda: not stage.started(), "everything that was started has ended", 10.0)
    assert not stage.overlay.exists()
    stage.wait_until_guest_works("a")
    assert stage.capabilities_of_a() == []


@pytest.mark.sampled(1)
@pytest.mark.parametrize("moment", BEFORE)
@pytest.mark.representative
def test_the_guard_brings_the_guest_back_when_the_orchestrator_is_killed(stage: Scene, moment: str) -> None:
    with stage.run_doomed(moment, Role.ORCHESTRATOR) as run:
        assert run.wait(SECONDS) == -signal.SIGKILL
        run_ended = "the orchestrator was killed: the guest runs on A as before"
        wait_until(lambda: run_ended in run.output(), run_ended, 10.0)
    assert_as_before(stage)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("moment", "number"),
    [("OVERLAY", signal.SIGINT), ("MIGRATE", signal.SIGHUP), ("SWITCHOVER", signal.SIGTERM)],
)
@pytest.mark.representative
def test_an_interrupted_migration_leaves_the_guest_on_a(
    stage: Scene, moment: str, number: signal.Signals
) -> None:
    with stage.run_doomed(moment, Role.ORCHESTRATOR, number=number) as run:
        assert run.wait(SECONDS) == 130, run.output()
    assert "interrupted in step" in run.output()
    # Whether the interruption or the switch-over comes first is a race; both ends of it are good.
    if moment == "SWITCHOVER" and "the guest is on B and stays there" in run.output():
        stage.wait_until_guest_works("b")
        assert not Role.A.find(stage.directory)
        return
    assert "the guest runs on A as before" in run.output()
    assert_as_before(stage)


def test_two_interruptions_while_the_overlay_is_created_leave_none(stage: Scene, tmp_path: Path) -> None:
    slow, made = tmp_path / "bin", tmp_path / "made"
    slow.mkdir()
    tool = slow / "nbd-overlay"
    real = NBD_MIGRATE.with_name("nbd-overlay")
    create = f'sleep 0.5; {real} "$@" && touch {made}; sleep 1'
    tool.write_text(f'#!/bin/sh\ncase $1 in create) {create};; *) exec {real} "$@";; esac\n')
    tool.chmod(0o755)
    stage.change("destination", bin=str(slow))
    with stage.run() as run:
        run.wait_for_line("step 2")
        for _ in range(2):
            run.signal(signal.SIGTERM)
            time.sleep(0.2)
        assert run.wait(SECONDS) == 130, run.output()
    time.sleep(2.0)
    assert made.exists()
    assert_as_before(stage)


@pytest.mark.parametrize(
    ("moment", "victim", "complaint"),
    [
        ("EXPORT", Role.GUARD, "the guard ended"),
        ("MIGRATE", Role.GUARD, "the guard ended"),
        *((moment, Role.SERVER, "the server on A was ended by signal 9") for moment in BEFORE[1:4]),
        ("MIGRATE", Role.SUPERVISOR_OF_SERVER, "the server on A ended, as its supervisor was killed"),
        *((moment, Role.B, "B's QEMU was ended by signal 9") for moment in BEFORE[3:]),
        ("SWITCHOVER", Role.SUPERVISOR_OF_B, "B's QEMU ended, as its supervisor was killed"),
    ],
)
@pytest.mark.representative
@pytest.mark.sampled(2)
def test_the_guest_stays_on_a_when_something_dies_before_the_cut_over(
    stage: Scene, moment: str, victim: Role, complaint: str
) -> None:
    with stage.run_doomed(moment, victim) as run:
        assert run.wait(SECONDS) == 1
    last = run.output().splitlines()[-1]
    # Where B dies in the switch-over, A's QEMU may be the first to say so.
    assert complaint in last or (moment == "SWITCHOVER" and "the other side gave up" in last)
    assert last.endswith("the guest runs on A as before")
    assert_as_before(stage)


@pytest.mark.parametrize("victim", [Role.SERVER, Role.SUPERVISOR_OF_SERVER, Role.GUARD])
def test_a_helper_that_dies_while_the_guest_stands_still_costs_nothing(stage: Scene, victim: Role) -> None:
    with stage.run_doomed("SWITCHOVER", victim) as run:
        status = run.wait(SECONDS * 2)
    # Whether its death or the switch-over comes first is a race; both ends of it are good.
    if status == 1:
        assert run.output().splitlines()[-1].endswith("the guest runs on A as before")
        assert_as_before(stage)
        return
    assert status == 0, run.output()
    stage.wait_until_guest_works("b")
    stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("moment", BEFORE)
def test_nothing_is_left_when_the_source_itself_dies(stage: Scene, moment: str) -> None:
    with stage.run_doomed(moment, Role.A) as run:
        assert run.wait(SECONDS) == 1
    # B's QEMU, which loses its other side, may be the first to be missed.
    assert "A's QEMU is gone and with it the guest" in run.output().splitlines()[-1]
    wait_until(lambda: not stage.started(), "everything that was started has ended", 10.0)
    assert not stage.overlay.exists()
    assert stage.image.exists()


def test_the_source_may_die_as_soon_as_the_guest_has_left(stage: Scene) -> None:
    with stage.run_doomed("ARRIVED", Role.A) as run:
        assert run.wait(SECONDS) == 0, run.output()
    stage.wait_until_guest_works("b")
    stage.quit_b()
    assert stage.wrong_sectors() == []


@pytest.mark.parametrize("victim", [Role.SERVER, Role.SUPERVISOR_OF_SERVER, Role.SUPERVISOR_OF_B])
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_the_stream_goes_on_when_the_server_or_a_supervisor_dies(stage: Scene, victim: Role) -> None:
    stage.change("limits", speed=32 << 20)
    with stage.run_doomed("PROGRESS", victim) as run:
        code = run.wait(SECONDS * 2)
        if code and QED_ABORTS in (stage.directory / "b.qed.qemu.log").read_text():
            pytest.skip(
                "QEMU's own QED has aborted, as 7.2 does now and then when a write waits for its source"
            )
        assert code == 0, run.output()
    assert ("the export is back" in run.output()) == (victim is Role.SERVER)
    stage.wait_until_only({Role.B})
    stage.wait_until_guest_works("b")
    stage.quit_b()
    assert stage.wrong_sectors(interrupted=True) == []


@pytest.mark.parametrize("moment", ["ARRIVED", "PROGRESS"])
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_the_guest_survives_on_b_when_the_orchestrator_is_killed_after_the_cut_over(
    stage: Scene, moment: str
) -> None:
    stage.change("limits", speed=8 << 20)
    with stage.run_doomed(moment, Role.ORCHESTRATOR) as run:
        assert run.wait(SECONDS) == -signal.SIGKILL
        wait_until(lambda: not Role.A.find(stage.directory), "A's QEMU ends", 10.0)
        stage.wait_until_guest_works("b")
        wait_until(lambda: not Role.GUARD.find(stage.directory), "the guard ends", 10.0)
    alive = {Role.B, Role.SERVER} | ({Role.FENCE} if moment == "PROGRESS" else set())
    wait_until(lambda: stage.started() == alive, f"{alive} are left", 10.0)
    assert stage.overlay.exists()
    assert stage.away.exists()


def test_an_interrupted_stream_leaves_the_guest_on_b(stage: Scene) -> None:
    stage.change("limits", speed=8 << 20)
    with stage.run_doomed("PROGRESS", Role.ORCHESTRATOR, number=signal.SIGTERM) as run:
        assert run.wait(SECONDS) == 130
    assert "the guest is on B and stays there" in run.output()
    stage.wait_until_guest_works("b")
    stage.wait_until_only({Role.B, Role.SERVER, Role.FENCE})
    # What docs/migrate.md says about ending it by hand.
    operator = Operator(
        {
            "DISK": str(stage.image),
            "SOURCE_QMP": "ended",
            "DESTINATION_QMP": str(stage.monitor_b),
            "NBD_PID_FILE": f"{stage.image}.nbdserve.pid",
            "FENCE_FILE": f"{stage.image}.fence.pid",
            "MOVE_TO": str(stage.moved),
        }
    )
    assert "every block is local" in operator.must(5)
    assert f"{stage.image} is now {stage.moved}" in operator.must(6)
    stage.wait_until_only({Role.B})
    stage.quit_b()
    assert stage.wrong_sectors() == []


@pytest.mark.representative
def test_both_halves_of_the_disk_are_kept_when_the_destination_dies_while_streaming(stage: Scene) -> None:
    stage.change("limits", speed=8 << 20)
    with stage.run_doomed("PROGRESS", Role.B) as run:
        assert run.wait(SECONDS) == 1
    last = run.output().splitlines()[-1]
    assert "B's QEMU was ended by signal 9" in last
    assert f"its disk is {stage.overlay} on B together with {stage.away} on A, which is still served" in last
    stage.wait_until_only({Role.SERVER, Role.FENCE})
    # And so it is: whoever opens the overlay now finds the guest's whole disk.
    assert stage.wrong_sectors(interrupted=True) == []


def test_a_server_that_dies_at_the_very_end_is_only_told(stage: Scene) -> None:
    with stage.run_doomed("SHUTDOWN", Role.SERVER) as run:
        assert run.wait(SECONDS) == 0, run.output()
    assert "the server on A was ended by signal 9" in run.output()
    stage.wait_until_only({Role.B})


@pytest.mark.representative
def test_a_destination_that_hangs_during_the_switch_over_is_ended_before_the_source_goes_on(
    stage: Scene,
) -> None:
    with monitor(stage.monitor_a) as a:
        # What is left to send must fit into the socket: a QEMU that cannot send it answers nothing either.
        a.execute("migrate-set-parameters", downtime_limit=1)
    stage.change("limits", silence=3.0, stop=1.0)
    with stage.run_doomed("SWITCHOVER", Role.B, number=signal.SIGSTOP) as run:
        assert run.wait(SECONDS) == 1
    if "it is not known where the guest is: A's QEMU did not answer" in run.output():
        # A's QEMU had more to send than fits into a socket, and answers nobody until B's takes it.
        remedy = re.search(r"if B's QEMU \(process ([0-9]+)\) hangs too, kill it", run.output())
        assert remedy
        os.kill(int(remedy[1]), signal.SIGKILL)
        stage.wait_until_guest_works("a")
        return
    halt = "the switch-over has come to a halt: no byte has moved for 3 s; the guest runs on A as before"
    assert halt in run.output()
    assert_as_before(stage)


@pytest.mark.representative
def test_two_migrations_of_a_guest_do_not_meet(stage: Scene) -> None:
    with stage.run_doomed("LAUNCH", Role.ORCHESTRATOR, number=signal.SIGSTOP) as first:
        first.wait_for_line("step 3")
        stage.change("limits", connect=1.0)
        with stage.run() as second:
            assert second.wait(SECONDS) == 1
        first.signal(signal.SIGCONT)
        assert first.wait(SECONDS) == 0, first.output()
    assert "is another client connected to it?" in second.output()
