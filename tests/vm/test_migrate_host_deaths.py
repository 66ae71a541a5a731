"""All that runs on a host dies at once, at every step of the migration of a guest with several disks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import MIB
from tests.support.many_disks import ManyDisks, many_disks
from tests.support.pasting import after, pasted_well
from tests.support.processes import wait_until
from tests.support.vms import Role

SECONDS = 120.0
BEFORE = ("EXPORT", "OVERLAY", "LAUNCH", "MIGRATE", "SWITCHOVER")
"""The moments at which the guest is still A's."""

SERVED = (Role.SERVER, Role.SUPERVISOR_OF_SERVER)
RECEIVING = (Role.B, Role.OVERLAY, Role.SUPERVISOR_OF_B, Role.SUPERVISOR_OF_OVERLAY)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[ManyDisks]:
    """A guest with two disks that runs on A."""
    with many_disks(tmp_path, sizes=(32 * MIB, 8 * MIB)) as made:
        made.change("limits", speed=12 * MIB)
        yield made


def left_on_b(stage: ManyDisks) -> list[str]:
    """What was made of its disks."""
    return [path.name for path in stage.directory.glob("b?.raw*") if path.suffix != ".log"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("moment", BEFORE)
def test_with_host_a_the_guest_ends_and_nothing_is_left_on_b(stage: ManyDisks, moment: str) -> None:
    victims = (Role.A,) if moment == "EXPORT" else (Role.A, *SERVED)
    with stage.run_doomed(moment, *victims) as run:
        assert run.wait(SECONDS) == 1, run.output()
    assert "A's QEMU is gone and with it the guest" in run.output().splitlines()[-1]
    wait_until(lambda: not stage.started(), "everything that was started has ended", SECONDS)
    assert left_on_b(stage) == []
    for disk in stage.disks:
        assert disk.image.read_bytes()[2 * MIB :] == disk.original[2 * MIB :]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("moment", ["MIGRATE", "SWITCHOVER"])
def test_without_host_b_the_guest_runs_on_on_a(stage: ManyDisks, moment: str) -> None:
    with stage.run_doomed(moment, *RECEIVING) as run:
        assert run.wait(SECONDS) == 1, run.output()
    assert run.output().splitlines()[-1].endswith("the guest runs on A as before")
    wait_until(lambda: not stage.started(), "everything that was started has ended", SECONDS)
    assert left_on_b(stage) == []
    stage.wait_until_guest_works("a")
    assert stage.capabilities_of_a() == []


@pytest.mark.sampled(1)
@pytest.mark.parametrize("moment", ["PROGRESS", "SHUTDOWN"])
@pytest.mark.representative
def test_what_served_on_a_is_started_again_after_the_cut_over(stage: ManyDisks, moment: str) -> None:
    with stage.run_doomed(moment, *SERVED, Role.FENCE) as run:
        assert run.wait(SECONDS) == 0, run.output()
    stage.assert_moved()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("moment", ["ARRIVED", "PROGRESS", "SHUTDOWN"])
def test_after_the_death_of_all_on_b_its_disks_are_completed_and_the_guest_started_again(
    stage: ManyDisks, moment: str
) -> None:
    with stage.run_doomed(moment, *RECEIVING) as run:
        assert run.wait(SECONDS) == 1, run.output()
    last = run.output().splitlines()[-1]
    complete = moment == "SHUTDOWN"
    again = "to start it again" if complete else "to start the guest again and complete its disks"
    pasted_well(after(again, last))
    stage.wait_until_guest_works("b")
    stage.wait_until_only({Role.B_AGAIN})
    for process in Role.B_AGAIN.find(stage.directory):
        process.kill()
    wait_until(lambda: not Role.B_AGAIN.find(stage.directory), "it ends")
    assert stage.verdict() == []
