"""What is finished, and what is not: as the journal and the two monitors say."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.common.errors import ConnectError
from recipes.commands.finding import found_on_b, refuse_unless_on_b, source
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.migrate.progress import Report
from recipes.migrate.state import Phase, State
from recipes.qemu.vm import EndedVm
from tests.support.journals import begun

GONE = EndedVm("A's QEMU")


def state_of(directory: Path, phase: Phase, content: bytes, address: str = "/a") -> State:
    """A migration that has come to this phase, with this in B's image."""
    state = begun(directory, address, phase, command=60.0).state
    assert state
    (directory / "b.raw").write_bytes(content)
    there = replace(state.plan.destination, image=str(directory / "b.raw"))
    # nbd-overlay is asked about the image, which takes a busy machine a while.
    limits = replace(state.plan.limits, command=60.0)
    return replace(state, plan=replace(state.plan, destination=there, limits=limits))


@pytest.mark.parametrize("phase", [Phase.TAKEN_BACK, Phase.LOST, Phase.LAUNCH])
def test_a_migration_whose_guest_did_not_come_to_b_is_not_finished(tmp_path: Path, phase: Phase) -> None:
    """Its image may hold what a guest wrote in an instant on B, and A's has gone on for days."""
    state = state_of(tmp_path, phase, b"x" * 512)
    with pytest.raises(
        MigrationError, match=rf"\({phase.value}\) is not to be finished: see nbd-migrate status"
    ):
        asyncio.run(refuse_unless_on_b(state, GONE, None, Host("B")))


@pytest.mark.parametrize(
    "phase", [Phase.SWITCH_OVER, Phase.ARRIVED, Phase.STREAM, Phase.SHUT_DOWN, Phase.DONE]
)
def test_a_migration_whose_guest_has_run_on_b_is_finished(tmp_path: Path, phase: Phase) -> None:
    state = state_of(tmp_path, phase, b"x" * 512)
    asyncio.run(refuse_unless_on_b(state, GONE, None, Host("B")))


def test_what_was_counted_of_a_complete_disk_is_kept(tmp_path: Path) -> None:
    known = begun(tmp_path, "/a", Phase.SHUT_DOWN)
    assert known.state
    [disk] = known.state.disks
    counted = replace(disk, complete=True, seeded=1, verified=2, written=3)
    known.append(replace(known.state, disks=(counted,)))
    for complete in (True, False):
        as_found = replace(disk, complete=complete)
        [kept] = found_on_b(known, known.state.plan, [as_found], "again").disks
        assert kept == (counted if complete else as_found)
    known.close()


def test_a_complete_disk_needs_no_a_that_can_be_reached(tmp_path: Path) -> None:
    plan = state_of(tmp_path, Phase.COMPLETE, b"", "255.255.255.255:4000").plan
    told: list[str] = []

    class Telling(Report):
        def note(self, text: str) -> None:
            told.append(text)

    found = asyncio.run(source(plan, Host("A"), Telling(), sure=True, complete=True))
    assert isinstance(found, EndedVm)
    assert told[0].startswith("A's QEMU was not ended, if it is still there: ")
    with pytest.raises(ConnectError):
        asyncio.run(source(plan, Host("A"), Telling(), sure=True, complete=False))
