"""nbd-migrate run: a guest with several disks moves, all of them at once, whatever dies on the way."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlay.formats.device.map_place import name_of
from recipes.migrate import journal
from recipes.migrate.state import Phase
from tests.support.killed import command
from tests.support.loops import loop_device
from tests.support.many_disks import ManyDisks, many_disks
from tests.support.pasting import after, pasted_well
from tests.support.processes import run as anyhow
from tests.support.processes import wait_until
from tests.support.vms import Role, running

SECONDS = 120.0
STATE = Path("/var/lib/nbd-migrate")
SLOW = 12 << 20
"""Bytes per second: the smallest disk is complete seconds before the largest."""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[ManyDisks]:
    """A guest with three disks that runs on A, and a plan in which nbd-overlay moves them, not too fast."""
    with many_disks(tmp_path) as made:
        made.change("limits", speed=SLOW)
        yield made


@pytest.mark.parametrize("engine", ["overlay", "qemu"])
@pytest.mark.representative
def test_a_guest_and_all_its_disks_move_while_it_writes_on_each(tmp_path: Path, engine: str) -> None:
    with many_disks(tmp_path, engine) as stage:
        with stage.run("--json") as run:
            assert run.wait(SECONDS) == 0, run.output()
        outcome = json.loads(run.output().splitlines()[-1])
        assert outcome["disk_bytes"] == sum(len(disk.original) for disk in stage.disks)
        stage.assert_moved()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("victim", [Role.SERVER, Role.ONE_OVERLAY, Role.OVERLAY])
@pytest.mark.representative
def test_the_streams_go_on_when_what_feeds_them_dies(stage: ManyDisks, victim: Role) -> None:
    with stage.run_doomed("PROGRESS", victim) as run:
        assert run.wait(SECONDS) == 0, run.output()
    if victim is Role.ONE_OVERLAY:
        assert "nbd-overlay of disk1 has ended; it is started again" in run.output()
    stage.assert_moved()


@pytest.mark.parametrize("victim", [Role.SERVER, Role.B])
def test_with_the_qemu_engine_a_dead_server_is_a_pause_and_a_dead_qemu_is_not_the_end_of_the_disks(
    tmp_path: Path, victim: Role
) -> None:
    with many_disks(tmp_path, "qemu") as stage:
        stage.change("limits", speed=SLOW)
        with stage.run_doomed("PROGRESS", victim) as run:
            assert run.wait(SECONDS) == (0 if victim is Role.SERVER else 1), run.output()
        if victim is Role.SERVER:
            stage.assert_moved()
            return
        pasted_well(after("to complete the disks without it", run.output().splitlines()[-1]))
        assert stage.verdict() == []


@pytest.mark.sampled(1)
@pytest.mark.parametrize("victim", [Role.B, Role.ONE_OVERLAY, Role.SERVER, Role.ORCHESTRATOR])
@pytest.mark.representative
def test_before_the_cut_over_the_guest_stays_on_a_and_nothing_is_left_on_b(
    stage: ManyDisks, victim: Role
) -> None:
    with stage.run_doomed("MIGRATE", victim) as run:
        assert run.wait(SECONDS) == (-signal.SIGKILL if victim is Role.ORCHESTRATOR else 1), run.output()
        wait_until(lambda: "the guest runs on A as before" in run.output(), "the guest's way back", SECONDS)
    wait_until(lambda: not stage.started(), "everything that was started has ended", SECONDS)
    assert [path.name for path in stage.directory.glob("b?.raw*") if path.suffix != ".log"] == []
    stage.wait_until_guest_works("a")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("boot", [False, True])
def test_the_disks_of_a_guest_whose_qemu_died_are_completed_with_or_without_it(
    stage: ManyDisks, boot: bool
) -> None:
    with stage.run_doomed("PROGRESS", Role.B) as run:
        assert run.wait(SECONDS) == 1, run.output()
    last = run.output().splitlines()[-1]
    targets = f"{stage.disks[0].target}, {stage.disks[1].target} and {stage.disks[2].target}"
    assert f"its disks are {targets} on B together with " in last
    if boot:
        pasted_well(after("to start the guest again and complete its disks", last))
        stage.wait_until_guest_works("b")
        stage.wait_until_only({Role.B_AGAIN})
        for process in Role.B_AGAIN.find(stage.directory):
            process.kill()
        wait_until(lambda: not Role.B_AGAIN.find(stage.directory), "it ends")
    else:
        pasted_well(after("to complete the disks without it", last))
        stage.wait_until_only(set())
    assert stage.verdict() == []
    assert all(disk.moved.exists() for disk in stage.disks)


def wait_until_one_is_complete(stage: ManyDisks) -> None:
    """The smallest disk is complete, as the journal says, and the others are not."""

    def complete() -> list[bool]:
        states = list(journal.known())
        return [disk.complete for disk in states[0].disks] if states else []

    wait_until(lambda: complete() == [False, True, False], "disk1 is complete, alone", SECONDS)


def test_an_nbd_overlay_whose_disk_is_complete_is_not_forgotten_while_others_follow(
    stage: ManyDisks,
) -> None:
    with stage.run() as run:
        wait_until_one_is_complete(stage)
        for process in Role.ONE_OVERLAY.find(stage.directory):
            process.kill()
        assert run.wait(SECONDS) == 0, run.output()
    assert "nbd-overlay of disk1 has ended; it is started again" in run.output()
    stage.assert_moved()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("victims", [{Role.ORCHESTRATOR}, {Role.ORCHESTRATOR, Role.OVERLAY, Role.SERVER}])
def test_what_is_complete_already_is_left_alone_by_who_goes_on(stage: ManyDisks, victims: set[Role]) -> None:
    with stage.run() as run:
        wait_until_one_is_complete(stage)
        run.kill()
    for victim in victims - {Role.ORCHESTRATOR}:
        for process in victim.find(stage.directory):
            process.kill()
    [name] = journal.names()
    told = command("status", name)[1]
    assert told.count(", not complete on B") == 2
    assert told.count(", complete on B") == 1
    code, said = command("resume", name)
    assert code == 0, said
    phases = [state.phase for state in journal.history(name)]
    assert phases[-1] is Phase.DONE
    assert all(state.disks[1].complete for state in journal.history(name)[phases.index(Phase.STREAM) + 2 :])
    stage.assert_moved()


def test_a_guest_that_switches_itself_off_needs_its_disks_no_less(stage: ManyDisks) -> None:
    with stage.run() as run:
        wait_until_one_is_complete(stage)
        stage.switch_off_b()
        assert run.wait(SECONDS) == 0, run.output()
    assert "the guest has shut itself down on B (guest-shutdown); its disk is completed" in run.output()
    stage.wait_until_only(set())
    assert stage.verdict() == []
    assert [path.name for path in stage.directory.glob("b?.raw.*") if path.suffix != ".log"] == []


@pytest.fixture
def on_a_device(tmp_path: Path) -> Iterator[ManyDisks]:
    """The guest, whose second disk is a loop device on A."""
    made = ManyDisks(tmp_path)
    made.change("limits", speed=SLOW)
    with loop_device(made.disks[1].image) as device:
        made.put_on(1, device)
        try:
            with running(made):
                yield made
        finally:
            shutil.rmtree(STATE / name_of(str(device)), ignore_errors=True)


def test_one_of_the_disks_may_be_a_device_which_stays_and_is_fenced(on_a_device: ManyDisks) -> None:
    stage, device = on_a_device, on_a_device.disks[1].image
    with stage.run() as run:
        assert run.wait(SECONDS) == 1
    assert f"finish.move_aside: {device} is a block device on A, which stays; leave it out" in run.output()
    stage.disks = [dataclasses.replace(disk, moved=disk.image) for disk in stage.disks]
    stage.change("finish", move_aside="")
    with stage.run() as run:
        wait_until_one_is_complete(stage)
        for disk in stage.disks:
            written = anyhow("qemu-io", "-f", "raw", "-c", "write 0 512", disk.away)
            assert 'Failed to get "write" lock' in written.stderr, written
        assert run.wait(SECONDS) == 0, run.output()
    assert list(device.parent.glob(f"{device.name}.*")) == []
    stage.assert_moved()


def refused(stage: ManyDisks, code: int) -> str:
    """The line with which a run ends before anything was started."""
    with stage.run() as run:
        assert run.wait(SECONDS) == code, run.output()
    assert stage.started() == set()
    return run.output().splitlines()[-1]


def test_each_disk_is_looked_at_before_anything_is_started(stage: ManyDisks) -> None:
    first, second, third = stage.plan.disk
    third_of = stage.disks[2]
    link = stage.directory / "link.raw"
    link.symlink_to(stage.disks[0].image)
    stage.change_disk(2, image=str(link))
    assert "is not the file of any disk in A's QEMU" in refused(stage, 2)
    stage.change_disk(2, image=third.image, node="nothing")
    assert "disk.node: A's QEMU has no block node or device 'nothing'" in refused(stage, 2)
    stage.change_disk(2, node="")
    third_of.target.write_text("mine")
    assert f"disk.target: {third_of.target} exists on B; remove it" in refused(stage, 1)
    assert third_of.target.read_text() == "mine"
    third_of.target.unlink()
    (stage.directory / "here").symlink_to(stage.directory)
    stage.change_disk(2, target=str(stage.directory / "here" / stage.disks[1].target.name))
    assert f"disk.target: {second.target} and {stage.plan.disk[2].target} are the same on B" in refused(
        stage, 1
    )
    stage.change_disk(2, target=third.target)
    third_of.moved.write_text("mine")
    assert f"finish.move_aside: {third_of.moved} exists on A; choose another name" in refused(stage, 1)
    third_of.moved.unlink()
    impatient = [
        word.replace("rerror=stop", "rerror=report") if "drive=disk2" in word else word
        for word in stage.plan.destination.qemu
    ]
    stage.change("destination", qemu=tuple(impatient))
    with stage.run() as run:
        assert run.wait(SECONDS) == 1
    assert "destination.qemu: the -device of disk2 has rerror=report" in run.output()
    wait_until(lambda: not stage.started(), "everything that was started has ended", SECONDS)
    assert first.image == str(stage.disks[0].image)
    stage.wait_until_guest_works("a")
