"""nbd-migrate run --policy hybrid: the disks are copied before the guest, who writes on them all the time."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from recipes.migrate import journal
from recipes.migrate.state import Phase
from tests.support.disks import MIB
from tests.support.killed import NAME, command, kill_at, traced
from tests.support.many_disks import ManyDisks, many_disks
from tests.support.processes import Process, wait_until
from tests.support.qcow2_disks import Qcow2Disks
from tests.support.vms import ROOT, Role, monitor, running

SECONDS = 120.0
ONE = (32 * MIB,)
THREE = (32 * MIB, 8 * MIB, 16 * MIB)
SLOW = 8 * MIB
"""Bytes per second: the first round takes seconds."""

exhaustive = pytest.mark.exhaustive


def hybrid(stage: ManyDisks, cutover: str = "auto", speed: int = 0) -> None:
    """Have its plan copy the disks before the cut-over."""
    stage.change("destination", policy="hybrid", cutover=cutover)
    stage.change("limits", speed=speed)
    if len(stage.disks) == 1:
        stage.change("finish", move_aside=str(stage.disks[0].moved))


def is_on_a_as_before(stage: ManyDisks) -> None:
    """The guest runs on A, whose QEMU neither records nor serves anything; nothing is left on B."""
    stage.wait_until_guest_works("a")
    wait_until(lambda: not stage.started(), f"nothing is left: {stage.started()}", SECONDS)
    assert stage.capabilities_of_a() == []
    with monitor(stage.monitor_a) as a:
        nodes = a.execute("query-named-block-nodes", flat=True)
        assert [each.get("dirty-bitmaps", []) for each in nodes] == [[]] * len(nodes)
        assert a.execute("query-block-exports") == []
    paths = [*stage.directory.glob("a*.raw.*"), *stage.directory.glob("b*.raw*")]
    # Who is killed leaves its pid file, which is in nobody's way.
    assert {path.suffix for path in paths} <= {".log", ".pid"}, paths


def moves(stage: ManyDisks) -> dict[str, object]:
    """Migrate it, and see that every byte is right; what the run has told."""
    with stage.run("--json", "--name", NAME) as run:
        assert run.wait(SECONDS) == 0, run.output()
        outcome: dict[str, object] = json.loads(run.output().splitlines()[-1])
    stage.assert_moved()
    state = journal.last(NAME)
    assert (state.phase, state.tracking, state.exporter) == (Phase.DONE, None, "")
    left = {path.suffix for path in stage.directory.glob("a*.raw.*")}
    assert left <= {".log"}, left
    return outcome


@pytest.mark.parametrize("sizes", [ONE, pytest.param(THREE, marks=exhaustive)])
@pytest.mark.representative
def test_every_byte_is_right_of_a_guest_that_writes_during_all_rounds(
    tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    with many_disks(tmp_path, sizes=sizes) as stage:
        hybrid(stage, speed=SLOW)
        outcome = moves(stage)
        assert outcome["precopied"] >= sum(sizes) * 0.9  # type: ignore[operator]
        assert outcome["predicted"] is not None
        # Nobody has asked for it.
        assert outcome["verified"] + outcome["written"] == sum(sizes)  # type: ignore[operator]
        code, told = command("status", NAME)
        assert code == 0
        assert re.search(r"copied before the cut-over: .*, rounds: [1-9]", told), told
        assert re.search(r"predicted to take .* were left\), and took .* of the downtime", told), told


def test_hybrid_takes_a_seed_and_what_came_of_it_is_compared(tmp_path: Path) -> None:
    with many_disks(tmp_path, sizes=ONE) as stage:
        hybrid(stage)
        seed = tmp_path / "yesterday"
        seed.write_bytes(stage.disks[0].original)
        with stage.run("--json", "--name", NAME, "--seed", str(seed)) as run:
            assert run.wait(SECONDS) == 0, run.output()
        stage.assert_moved()
        told = json.loads(run.output().splitlines()[-1])
        assert told["verified"] + told["written"] == sum(ONE)
        assert f"{stage.disks[0].target} is verified: " in run.output()


@exhaustive
def test_hybrid_compares_nothing_where_it_is_told_not_to(tmp_path: Path) -> None:
    with many_disks(tmp_path, sizes=ONE) as stage:
        hybrid(stage)
        with stage.run("--json", "--name", NAME, "--no-verify") as run:
            assert run.wait(SECONDS) == 0, run.output()
        stage.assert_moved()
        told = json.loads(run.output().splitlines()[-1])
        assert (told["verified"], told["written"]) == (0, 0)


@exhaustive
def test_disks_that_only_as_qemu_can_read_are_copied_before_as_well(tmp_path: Path) -> None:
    stage = Qcow2Disks(tmp_path)
    hybrid(stage, speed=SLOW)
    with running(stage):
        moves(stage)
    assert list(tmp_path.glob("*.exporter")) == []


UNTOLD = """
import sys
from recipes.precopy.tracker import Tracker

async def nothing(self, *, last=False):
    return 0

Tracker._read = nothing
from recipes.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""nbd-migrate whose overlays are never told what the guest has changed."""


HURRIED = """
import sys
from recipes.precopy import rounds

rounds.REST = 0.2
from recipes.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""nbd-migrate that does not rest between two rounds while the RAM moves."""


@exhaustive
def test_every_byte_is_right_where_there_are_rounds_while_the_ram_moves(tmp_path: Path) -> None:
    with many_disks(tmp_path, sizes=THREE) as stage:
        hybrid(stage)
        with monitor(stage.monitor_a) as a:
            a.execute("migrate-set-parameters", max_bandwidth=384 << 10)
        argv = [sys.executable, "-c", HURRIED, "run", str(stage.plan_file()), "--name", NAME]
        with Process(argv, tmp_path / "run.log", cwd=ROOT) as run:
            assert run.wait(SECONDS) == 0, run.output()
        assert "in one round before the cut-over" in run.output()
        assert journal.last(NAME).rounds[-1].number >= 1
        stage.assert_moved()


@pytest.mark.representative
def test_a_block_that_was_not_forgotten_would_be_seen(tmp_path: Path) -> None:
    """Of the test above: it fails where nothing is invalidated."""
    with many_disks(tmp_path, sizes=ONE) as stage:
        hybrid(stage, speed=SLOW)
        # A comparison would keep A, or see what the guest has written over it since.
        argv = [sys.executable, "-c", UNTOLD, "run", str(stage.plan_file()), "--no-verify", "--name", NAME]
        with Process(argv, tmp_path / "run.log", cwd=ROOT) as run:
            assert run.wait(SECONDS) == 0, run.output()
        stage.wait_until_guest_works("b")
        wrong = stage.verdict(stage.stop_b())
        assert wrong
        assert all(each.startswith("disk0: sector ") for each in wrong)


@pytest.mark.parametrize(
    "victim",
    [
        Role.ORCHESTRATOR,
        *(pytest.param(each, marks=exhaustive) for each in (Role.SERVER, Role.OVERLAY, Role.B)),
    ],
)
@pytest.mark.representative
def test_whatever_dies_while_it_is_copied_the_guest_stays_on_a_and_nothing_is_left(
    tmp_path: Path, victim: Role
) -> None:
    with many_disks(tmp_path, sizes=THREE) as stage:
        hybrid(stage, speed=SLOW)
        with stage.run_doomed("PRECOPY", victim) as run:
            assert run.wait(SECONDS) == (-signal.SIGKILL if victim is Role.ORCHESTRATOR else 1), run.output()
            wait_until(lambda: "the guest runs on A as before" in run.output(), "the way back", SECONDS)
        is_on_a_as_before(stage)
        if victim is not Role.ORCHESTRATOR:
            return
        # The same may run again at once.
        moves(stage)


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (Role.SERVER, signal.SIGKILL),
        *(
            pytest.param(*each, marks=exhaustive)
            for each in (
                (Role.SERVER, signal.SIGSTOP),
                (Role.OVERLAY, signal.SIGKILL),
                (Role.OVERLAY, signal.SIGSTOP),
                (Role.ORCHESTRATOR, signal.SIGKILL),
            )
        ),
    ],
)
def test_a_guest_whose_last_bitmap_cannot_be_read_goes_on_on_a(
    tmp_path: Path, victim: Role, number: signal.Signals
) -> None:
    with many_disks(tmp_path, sizes=ONE) as stage:
        hybrid(stage)
        if number is signal.SIGSTOP:
            stage.change("limits", command=10.0, stop=5.0)
        with stage.run_doomed("SWITCHOVER", victim, number=number) as run:
            assert run.wait(SECONDS) == (-signal.SIGKILL if victim is Role.ORCHESTRATOR else 1), run.output()
            wait_until(lambda: "the guest runs on A as before" in run.output(), "the way back", SECONDS)
        is_on_a_as_before(stage)


def test_the_guest_stays_until_it_is_told_to_go(tmp_path: Path) -> None:
    with many_disks(tmp_path, sizes=ONE) as stage:
        hybrid(stage, cutover="manual")
        assert command("cutover", NAME)[0] == 1
        with stage.run("--name", NAME) as run:
            told = f"to let it go now: nbd-migrate cutover {NAME}"
            wait_until(lambda: told in run.output(), "the guest is waited for", SECONDS)
            wait_until(lambda: "pre-copy round 1" in command("status", NAME)[1], "a second round", SECONDS)
            assert json.loads(command("status", NAME, "--json")[1])["precopy"]["number"] >= 1
            assert command("cutover", NAME) == (0, f"{NAME}: the guest goes now\n")
            assert run.wait(SECONDS) == 0, run.output()
            assert "the cut-over was asked for" in run.output()
        code, said = command("cutover", NAME)
        assert (code, "it is too late, or not needed" in said) == (1, True), said
        stage.assert_moved()


@exhaustive
def test_a_guest_may_be_told_to_go_in_the_middle_of_the_first_round(tmp_path: Path) -> None:
    with many_disks(tmp_path, sizes=THREE) as stage:
        hybrid(stage, cutover="when-converged", speed=MIB)
        with stage.run("--name", NAME) as run:
            wait_until(lambda: "pre-copy round 0" in command("status", NAME)[1], "it is copied", SECONDS)
            assert command("cutover", NAME)[0] == 0
            assert command("speed", NAME, "0")[0] == 0
            assert run.wait(SECONDS) == 0, run.output()
        stage.assert_moved()


ENTRIES = 23
"""How often an undisturbed run makes something durable; see test_migrate_journal.py."""

PRECOPY_ENTRY = 12
"""Which of these announces that the copying begins; the next ones, bitmaps, their server, and the RAM."""


@exhaustive
def test_a_run_makes_as_many_entries_as_are_known_here(tmp_path: Path) -> None:
    trace = tmp_path / "fsync"
    with many_disks(tmp_path, sizes=ONE) as stage:
        hybrid(stage)
        with traced(stage, "-o", str(trace)) as made:
            assert made.wait(SECONDS) == 0
        assert trace.read_text().count("fsync(") == ENTRIES
        stage.assert_moved()


@pytest.mark.parametrize(
    "entry",
    [PRECOPY_ENTRY + 1, *(pytest.param(PRECOPY_ENTRY + number, marks=exhaustive) for number in (0, 2, 3))],
)
@pytest.mark.parametrize("wish", ["abort", pytest.param("resume", marks=exhaustive)])
def test_a_migration_that_was_killed_while_it_copied_is_taken_back_or_begun_anew(
    tmp_path: Path, entry: int, wish: str
) -> None:
    with many_disks(tmp_path, sizes=ONE) as stage:
        hybrid(stage)
        assert kill_at(stage, entry, guards=True) in (Phase.PRECOPY, Phase.MIGRATE)
        code, said = command(wish, NAME)
        assert code == 0, said
        if wish == "abort":
            is_on_a_as_before(stage)
            assert journal.last(NAME).phase is Phase.TAKEN_BACK
        else:
            stage.assert_moved()


@exhaustive
@pytest.mark.parametrize("entry", [ENTRIES - 4, ENTRIES - 3])
def test_what_was_compared_while_the_command_was_killed_is_told_by_resume(tmp_path: Path, entry: int) -> None:
    """The last entries before the disk is complete: that it is copied and compared, and what came of that."""
    with many_disks(tmp_path, sizes=ONE) as stage:
        hybrid(stage)
        assert kill_at(stage, entry, guards=True) is Phase.STREAM
        code, said = command("resume", NAME)
        assert code == 0, said
        stage.assert_moved()
        [disk] = journal.last(NAME).disks
        assert disk.verified + disk.written == disk.size


@exhaustive
def test_a_guest_that_has_changed_sides_unseen_is_found_on_b(tmp_path: Path) -> None:
    """What was copied before is not taken for what a guest has written, nor the other way round."""
    with many_disks(tmp_path, sizes=ONE) as stage:
        hybrid(stage)
        with stage.run_doomed("ARRIVED", Role.ORCHESTRATOR) as run:
            run.wait(SECONDS)
        stage.wait_until_guest_works("b")
        code, said = command("abort", "a0")
        assert (code, "it is too late" in said) == (1, True), said
        code, said = command("resume", "a0")
        assert code == 0, said
        stage.assert_moved()
