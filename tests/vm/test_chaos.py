"""Rounds of ``make chaos`` that stand for the others: of each kind that differs in what it needs."""

from __future__ import annotations

import os

import pytest

from tests.chaos import rounds

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--channel", "tls", "--engine", "overlay"), marks=pytest.mark.representative),
        ("--channel", "ssh", "--format", "qcow2", "--policy", "hybrid", "--disks", "2"),
        ("--channel", "single", "--format", "raw", "--policy", "hybrid", "--disks", "2"),
        ("--channel", "plain", "--format", "raw", "--disks", "1", "--engine", "qemu"),
    ],
    ids=lambda options: "-".join(options[1::2]),
)
def test_a_round_comes_to_its_end(options: tuple[str, ...]) -> None:
    assert rounds.main([*options, "1", "1"]) == 0
