"""The window as it stands: what A is needed for, and that it says 0 exactly when A may go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recipes.migrate.journal import Told
from recipes.migrate.progress import Progress
from recipes.migrate.state import Disk, Phase, State
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Destination, Export, Plan, Source
from recipes.running.window import Window, window_of

MIB = 1 << 20
PLAN = Plan(
    Source(qmp="/a.qmp"),
    Export(uri="nbd://127.0.0.1/vm"),
    Destination(qemu=("qemu",), qmp="/b.qmp", migration="unix:/m"),
    disk=(PlannedDisk("/images/a", "/images/b", "disk0"),),
)
STREAM = State("vm", PLAN, Phase.STREAM, disks=(Disk("/a", "/b", 64 * MIB),), arrived=1000.0)
TOLD = Told(1005.0, Progress(32 * MIB, 64 * MIB, 4.0 * MIB, 5.0, left=8.0, needed=36 * MIB))


def test_an_open_window_is_told_in_bytes_and_seconds() -> None:
    window = window_of(STREAM, TOLD, at_work=True)
    assert window == Window(True, 36 * MIB, 8.0, None)
    assert window.described() == (
        "open: A is needed for 36 MiB that are not on stable storage on B, for 8 s at this rate"
    )


def test_nothing_is_predicted_where_nobody_is_at_work() -> None:
    window = window_of(STREAM, TOLD, at_work=False)
    assert window == Window(True, 36 * MIB, None, None)


def test_what_was_told_before_the_cut_over_says_nothing_of_the_window() -> None:
    window = window_of(STREAM, replace(TOLD, time=999.0), at_work=True)
    assert window == Window(True, None, None, None)
    assert window_of(STREAM, None, at_work=True) == window
    assert "is not known" in window.described()


def test_a_disk_that_is_only_compared_with_a_needs_it_no_more() -> None:
    assert TOLD.progress is not None
    told = replace(TOLD, progress=replace(TOLD.progress, needed=0))
    window = window_of(STREAM, told, at_work=True)
    assert window == Window(False, 0, 0.0, None)
    assert window.described().startswith("closed: ")


@pytest.mark.parametrize("phase", [Phase.COMPLETE, Phase.SHUT_DOWN, Phase.DONE])
def test_a_window_that_is_closed_says_how_long_it_was_open(phase: Phase) -> None:
    disks = tuple(replace(disk, complete=True) for disk in STREAM.disks)
    window = window_of(replace(STREAM, phase=phase, disks=disks, window=12.5), TOLD, at_work=False)
    assert window == Window(False, 0, 0.0, 12.5)
    assert window.described().startswith("closed after 12.5 s: ")


@pytest.mark.parametrize("phase", [Phase.RECOVERING, Phase.RECOVERED])
def test_a_guest_that_has_gone_back_has_no_window(phase: Phase) -> None:
    assert window_of(replace(STREAM, phase=phase), TOLD, at_work=True) is None


def test_a_guest_that_is_on_a_has_no_window() -> None:
    assert window_of(replace(STREAM, phase=Phase.MIGRATE, arrived=0.0), TOLD, at_work=True) is None
