"""A migration of two disks is taken up, or taken back, wherever its command was killed, between them too.

As in test_migrate_journal.py: at every entry of the journal, each in one of the two ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.migrate import journal
from recipes.migrate.decide import MOVING, PREPARING, SENDING
from recipes.migrate.state import Phase
from tests.support.killed import NAME, SECONDS, command, kill_at, traced
from tests.support.many_disks import ManyDisks
from tests.support.processes import wait_until
from tests.support.vms import running

ENTRIES = 22
"""Four more than with one disk: two while the other image is made, one nbd-overlay, one complete disk."""

SIZES = (8 << 20, 2 << 20)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[ManyDisks]:
    """A guest that runs on A, with two disks."""
    made = ManyDisks(tmp_path, sizes=SIZES)
    with running(made):
        yield made


def is_on_a_as_before(stage: ManyDisks) -> None:
    """Nothing shows that there was a migration."""
    stage.wait_until_guest_works("a")
    wait_until(lambda: not stage.started(), f"nothing is left: {stage.started()}", SECONDS)
    assert stage.capabilities_of_a() == []
    left = {path.name for path in stage.directory.iterdir() if path.name.startswith("b")}
    logs = {f"b{number}.raw.{what}.log" for number in (0, 1) for what in ("qemu", "overlay")}
    assert left <= {"b.serial", "b.qmp", "b2.qmp", *logs}, left


def test_a_run_makes_as_many_entries_as_are_tried(stage: ManyDisks, tmp_path: Path) -> None:
    trace = tmp_path / "fsync"
    with traced(stage, "-o", str(trace)) as made:
        assert made.wait(SECONDS) == 0, made.output()
    assert trace.read_text().count("fsync(") == ENTRIES
    drives = [[each.disk for each in state.processes if each.disk] for state in journal.history(NAME)]
    assert ["disk0", "disk1"] in drives
    stage.assert_moved()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("entry", range(1, ENTRIES + 1))
@pytest.mark.representative
def test_a_migration_that_was_killed_between_two_disks_loses_neither(stage: ManyDisks, entry: int) -> None:
    phase = kill_at(stage, entry, guards=entry % 4 < 2)
    can_go_back = phase in PREPARING | SENDING | MOVING
    if entry % 2 and can_go_back:
        code, said = command("abort", NAME)
        assert code == 0, said
        is_on_a_as_before(stage)
        return
    if not can_go_back:
        code, said = command("abort", NAME)
        assert (code, "it is too late, and nothing was touched: the guest " in said) == (1, True), said
    code, said = command("resume", NAME)
    assert code == 0, said
    assert journal.last(NAME).phase is Phase.DONE
    stage.assert_moved()
