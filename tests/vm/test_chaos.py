"""A round of ``make chaos`` of each kind that differs in what it needs of this machine."""

from __future__ import annotations

import pytest

from tests.vm import chaos


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    [
        ("--channel", "ssh", "--format", "qcow2", "--policy", "hybrid", "--disks", "2"),
        ("--channel", "tls", "--format", "raw", "--policy", "postcopy", "--disks", "3"),
        ("--channel", "single", "--format", "raw", "--policy", "hybrid", "--disks", "2"),
        ("--channel", "plain", "--format", "raw", "--disks", "1", "--engine", "qemu"),
    ],
    ids=lambda options: "-".join(options[1::2]),
)
def test_a_round_comes_to_its_end(options: tuple[str, ...]) -> None:
    assert chaos.main([*options, "1", "1"]) == 0
