"""A Linux with three disks moves; what dies on the way costs it nothing that it wrote on any of them."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.linux_disks import linux_disks
from tests.support.vms import Role

SECONDS = 60.0
WRITE = 600.0
"""Seconds in which the guest must have written some records more."""


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("engine", "victim"),
    [("overlay", None), ("overlay", Role.ONE_OVERLAY), ("overlay", Role.SERVER), ("qemu", Role.SERVER)],
)
def test_a_linux_loses_nothing_on_any_of_its_disks(engine: str, victim: Role | None) -> None:
    with linux_disks(engine) as stage:
        doomed = stage.run_doomed("PROGRESS", victim) if victim else stage.run()
        with doomed as run:
            assert run.wait(SECONDS) == 0, run.output()
        asyncio.run(stage.guest_on_b.reach(stage.guest_on_b.announced + 48, WRITE))
        memory = stage.verify_on(stage.guest_on_b)
        assert memory.written > stage.guest_on_a.announced > 0
        assert stage.faults(memory) == []


@pytest.mark.exhaustive
def test_a_linux_whose_disks_are_copied_before_it_loses_nothing() -> None:
    with linux_disks() as stage:
        stage.change("destination", policy="hybrid")
        with stage.run() as run:
            assert run.wait(SECONDS * 3) == 0, run.output()
        assert "before the cut-over" in run.output()
        asyncio.run(stage.guest_on_b.reach(stage.guest_on_b.announced + 48, WRITE))
        assert stage.faults(stage.verify_on(stage.guest_on_b)) == []
