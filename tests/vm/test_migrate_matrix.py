"""A Linux moves between two hosts that ssh leads to, without a plan's file, whatever its disks are."""

from __future__ import annotations

import itertools

import pytest

from tests.support.hosts_of_matrix import FORMS, guest_on_a

CELLS = tuple(itertools.product(FORMS, (1, 3), ("postcopy", "hybrid"), ("tls", "ssh", "single")))
STAND_FOR_THE_OTHERS = {
    ("raw", 1, "postcopy", "ssh"),
    ("chain", 1, "hybrid", "tls"),
    ("qcow2", 3, "hybrid", "single"),
}


def parameters() -> list[object]:
    """Each cell; every other guest was started by -drive."""
    return [
        pytest.param(
            *(*cell, ("-blockdev", "-drive")[sum(map(len, map(str, cell))) % 2]),
            id="-".join(map(str, cell)),
            marks=() if cell in STAND_FOR_THE_OTHERS else pytest.mark.exhaustive,
        )
        for cell in CELLS
    ]


@pytest.mark.parametrize(("form", "disks", "policy", "channel", "started_by"), parameters())
@pytest.mark.representative
def test_a_linux_moves_whatever_its_disks_are(
    form: str, disks: int, policy: str, channel: str, started_by: str
) -> None:
    with guest_on_a(form, disks, started_by) as stage:
        stage.move("a", "b", "--channel", channel, "--policy", policy)
        stage.works()
        memory = stage.verify_on(stage.guest_on_b)
        assert stage.faults(memory) == []


def test_a_guest_moves_there_and_back_and_there_again() -> None:
    with guest_on_a("raw", 1, "-drive") as stage:
        for origin, to in ("ab", "ba", "ab"):
            stage.move(origin, to)
            stage.works()
        memory = stage.verify_on(stage.guest_on_b)
        assert stage.faults(memory) == []
