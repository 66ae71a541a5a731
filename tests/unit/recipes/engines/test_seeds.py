"""The copies that B is said to have are looked at before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.common import clock
from recipes.checks.space import Need
from recipes.engines.seeds import check_seeds
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.plans.plan import Destination, Export, Plan, Source
from tests.support.loops import loop_device

MIB = 1 << 20


def looked_at(seed: Path, size: int) -> list[str]:
    """Return what may not be expected of it, for a disk of this size."""
    plan = Plan(
        Source(qmp="/run/a.qmp", image="/a.raw"),
        Export(uri="nbd://192.0.2.1/vm"),
        Destination(qemu=("q",), image="/b.raw", qmp="/b.qmp", migration="unix:/m", seed=str(seed)),
    )
    return clock.run(check_seeds(plan, [Need("/b.raw", size)], Host("B")))


def test_a_block_device_is_looked_at_by_whose_path_does_not_lead_to_blockdev(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seed").write_bytes(b"x" * 2 * MIB)
    with loop_device(tmp_path / "seed") as device, monkeypatch.context() as context:
        context.setenv("PATH", "/usr/bin:/bin")
        assert looked_at(device, 2 * MIB) == []
        [warning] = looked_at(device, MIB)
        assert f"{device} has {2 * MIB} bytes, the disk {MIB}" in warning


def test_a_seed_of_which_no_size_is_told_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seed").write_bytes(b"x")
    (tmp_path / "stat").write_text("#!/bin/sh\necho stat: that does not work >&2; exit 1\n")
    (tmp_path / "stat").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(MigrationError, match="stat: that does not work"):
        looked_at(tmp_path / "seed", MIB)
