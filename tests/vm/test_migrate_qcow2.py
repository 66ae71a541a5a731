"""nbd-migrate run: disks in qcow2 images, over others, which A's QEMU serves until the cut-over."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.migrate import journal
from recipes.migrate.state import BEFORE, Phase
from tests.support.killed import NAME, command, kill_at, traced
from tests.support.many_disks import ManyDisks
from tests.support.processes import Process, wait_until
from tests.support.processes import run as anyhow
from tests.support.qcow2_disks import Qcow2Disks
from tests.support.vms import NBD_MIGRATE, QEMU, Role, monitor, running

SECONDS = 120.0
SLOW = 12 << 20
ENTRIES = 29
"""Of the journal of such a migration."""
EXHAUSTIVE = pytest.mark.exhaustive


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Qcow2Disks]:
    """A guest with three disks that runs on A, two of them qcow2, and a plan that moves them not too fast."""
    made = Qcow2Disks(tmp_path)
    made.change("limits", speed=SLOW)
    with running(made):
        yield made


def serves_nothing(stage: ManyDisks) -> bool:
    """Whether A's QEMU, as which it was before, has no NBD server, and there is no place for its socket."""
    with monitor(stage.monitor_a) as a:
        exports = a.execute("query-block-exports")
        refused = anyhow("nbdinfo", f"nbd+unix:///disk0?socket={stage.directory}/a0.qcow2.exporter/nbd")
    return exports == [] and refused.returncode != 0 and not list(stage.directory.glob("*.exporter"))


@pytest.mark.parametrize("engine", ["overlay", pytest.param("qemu", marks=EXHAUSTIVE)])
@pytest.mark.representative
def test_disks_with_and_without_others_below_them_move_and_a_is_free_at_once(
    tmp_path: Path, engine: str
) -> None:
    stage = Qcow2Disks(tmp_path, engine)
    stage.change("limits", speed=SLOW)
    with running(stage):
        with stage.run() as run:
            run.wait_for_line("step 5  stream", SECONDS)
            wait_until(lambda: not Role.A.find(stage.directory), "A's QEMU has ended", SECONDS)
            assert run.running, "the disks are copied after that"
            for disk in stage.disks:
                written = anyhow("qemu-io", "-c", "write 0 512", disk.away)
                assert 'Failed to get "write" lock' in written.stderr, written
            assert run.wait(SECONDS) == 0, run.output()
        assert list(tmp_path.glob("*.exporter")) == []
        stage.assert_moved()


@pytest.mark.parametrize(
    "victim",
    [
        Role.ORCHESTRATOR,
        pytest.param(Role.SERVER, marks=EXHAUSTIVE),
        pytest.param(Role.B, marks=EXHAUSTIVE),
    ],
)
def test_before_the_cut_over_the_guest_stays_and_its_qemu_serves_nothing_more(
    stage: Qcow2Disks, victim: Role
) -> None:
    with stage.run_doomed("MIGRATE", victim) as run:
        assert run.wait(SECONDS) == (-signal.SIGKILL if victim is Role.ORCHESTRATOR else 1), run.output()
        wait_until(lambda: "the guest runs on A as before" in run.output(), "the guest's way back", SECONDS)
    wait_until(lambda: not stage.started(), "everything that was started has ended", SECONDS)
    stage.wait_until_guest_works("a")
    wait_until(lambda: serves_nothing(stage), "A's QEMU is as it was", SECONDS)
    assert list(stage.directory.glob("b*.raw")) == []


@pytest.mark.parametrize("victim", [Role.A, pytest.param(Role.SERVER, marks=EXHAUSTIVE)])
def test_what_dies_while_the_server_changes_to_the_files_is_only_waited_for(
    stage: Qcow2Disks, victim: Role
) -> None:
    with stage.run_doomed("ARRIVED", victim) as run:
        assert run.wait(SECONDS) == 0, run.output()
    assert list(stage.directory.glob("*.exporter")) == []
    stage.assert_moved()


@EXHAUSTIVE
def test_where_the_files_cannot_be_served_the_qemu_of_a_goes_on_serving_them(
    stage: Qcow2Disks, tmp_path: Path
) -> None:
    place = tmp_path / "bin"
    place.mkdir()
    script = f'case "$*" in *format=qcow2*) exit 1;; esac; exec {NBD_MIGRATE.with_name("nbdserve")} "$@"'
    (place / "nbdserve").write_text(f"#!/bin/sh\n{script}\n")
    (place / "nbdserve").chmod(0o755)
    stage.change("source", bin=str(place))
    with stage.run() as run:
        assert run.wait(SECONDS) == 0, run.output()
    assert "A's disks cannot be served from their files: the server on A ended with code 1" in run.output()
    assert "A's QEMU was not ended, as it serves " in run.output()
    assert list(stage.directory.glob("*.exporter")) == []
    stage.assert_moved()


@EXHAUSTIVE
def test_the_files_are_served_also_where_the_guest_has_ended_as_it_arrived(stage: Qcow2Disks) -> None:
    with stage.run_doomed("ARRIVED", Role.B) as run:
        assert run.wait(SECONDS) == 1, run.output()
    wait_until(lambda: not Role.A.find(stage.directory), "A's QEMU has ended", SECONDS)
    assert list(stage.directory.glob("*.exporter")) == []
    [name] = journal.names()
    code, said = command("resume", name)
    assert code == 0, said
    stage.wait_until_only(set())
    assert stage.verdict() == []


@pytest.mark.parametrize(
    "victims",
    [
        {Role.ORCHESTRATOR},
        pytest.param({Role.ORCHESTRATOR, Role.A}, marks=EXHAUSTIVE),
        pytest.param({Role.ORCHESTRATOR, Role.A, Role.SERVER}, marks=EXHAUSTIVE),
        pytest.param({Role.ORCHESTRATOR, Role.GUARD}, marks=EXHAUSTIVE),
    ],
    ids=lambda victims: "+".join(sorted(victim.name for victim in victims)),
)
def test_a_run_that_is_killed_at_the_cut_over_leaves_what_the_guest_needs_and_is_taken_up(
    stage: Qcow2Disks, victims: set[Role]
) -> None:
    with stage.run_doomed("ARRIVED", *victims) as run:
        assert run.wait(SECONDS) == -signal.SIGKILL, run.output()
    if Role.A not in victims:
        # It reads all over its disks, most of which only A has.
        stage.wait_until_guest_works("b")
        assert Role.A.find(stage.directory)
    [name] = journal.names()
    wait_until(lambda: journal.actor(name) == 0, "nobody is at work", SECONDS)
    code, said = command("resume", name)
    assert code == 0, said
    assert journal.last(name).phase is Phase.DONE
    assert not Role.A.find(stage.directory)
    assert list(stage.directory.glob("*.exporter")) == []
    stage.assert_moved()


@EXHAUSTIVE
@pytest.mark.parametrize("entry", range(1, ENTRIES + 1))
def test_a_run_that_is_killed_at_any_entry_is_taken_back_or_up(tmp_path: Path, entry: int) -> None:
    stage = Qcow2Disks(tmp_path)
    with running(stage):
        phase = kill_at(stage, entry, guards=entry % 4 < 2)
        if entry % 2 and phase in BEFORE:
            code, said = command("abort", NAME)
            assert code == 0, said
            stage.wait_until_guest_works("a")
            wait_until(lambda: not stage.started(), "nothing is left", SECONDS)
            assert serves_nothing(stage)
            return
        code, said = command("resume", NAME)
        assert code == 0, said
        assert journal.last(NAME).phase is Phase.DONE
        stage.assert_moved()


@EXHAUSTIVE
def test_no_entry_is_left_out_above(stage: Qcow2Disks, tmp_path: Path) -> None:
    trace = tmp_path / "fsync"
    with traced(stage, "-o", str(trace)) as made:
        assert made.wait(SECONDS) == 0, made.output()
    assert trace.read_text().count("fsync(") == ENTRIES


class FoundQcow2(Qcow2Disks):
    """The same guest, started by ``-drive`` and ``-device``, of which there is no plan."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        there = directory / "there"
        there.mkdir()
        self.disks = [
            dataclasses.replace(disk, target=there / f"{disk.image.stem}.raw", moved=disk.image)
            for disk in self.disks
        ]
        self.monitor_b = directory / "a.moved.qmp"
        (directory / "b.serial").symlink_to(directory / "a.moved.serial")

    def source_qemu(self) -> list[str]:
        """A's command line; the BIOS numbers the disks as they are here."""
        drives = [
            f"file={disk.image},format={disk.image.suffix[1:]},if=none,id=disk{number}"
            for number, disk in enumerate(self.disks)
        ]
        return [
            *QEMU,
            *(word for drive in drives for word in ("-drive", drive)),
            *(
                word
                for number in range(len(drives))
                for word in ("-device", f"virtio-blk-pci,drive=disk{number},bootindex={number}")
            ),
            *("-serial", f"file:{self.directory / 'a.serial'}"),
            *("-qmp", f"unix:{self.monitor_a},server=on,wait=off"),
        ]


def test_a_guest_with_qcow2_disks_is_found_out_and_moves_without_a_plan(tmp_path: Path) -> None:
    stage = FoundQcow2(tmp_path)
    with running(stage):
        argv = [
            str(NBD_MIGRATE),
            "run",
            "--source",
            str(stage.monitor_a),
            "--to-dir",
            str(tmp_path / "there"),
        ]
        with Process(argv, tmp_path / "run.log") as moving:
            assert moving.wait(SECONDS) == 0, moving.output()
        stage.assert_moved()


@pytest.mark.parametrize("drive", ["disk0", pytest.param("disk1", marks=EXHAUSTIVE)])
@pytest.mark.representative
def test_a_snapshot_that_is_taken_on_the_way_ends_the_migration_with_the_guest_on_a(
    stage: Qcow2Disks, drive: str
) -> None:
    """Since then the guest writes elsewhere, and B would have had the disk of before."""
    snapshot = {
        "node-name": drive,
        "snapshot-file": str(stage.directory / "snapshot.qcow2"),
        "snapshot-node-name": "snapshot",
    }
    taking = ("qmp", str(stage.second_a), "blockdev-snapshot-sync", json.dumps(snapshot))
    stage.change("hooks", before_cutover=(str(NBD_MIGRATE), *taking))
    with stage.run() as run:
        assert run.wait(SECONDS) == 1, run.output()
    last = run.output().splitlines()[-1]
    assert "the guest's disks have changed since step 1: disk.image: " in last
    assert last.endswith("; the guest runs on A as before")
    stage.wait_until_guest_works("a")
    wait_until(lambda: serves_nothing(stage), "A's QEMU is as it was", SECONDS)
