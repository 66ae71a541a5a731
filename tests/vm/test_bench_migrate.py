"""The benchmark of a migration, on a small disk: all that it does, but not what its figures are."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.bench.migrate.contenders import CONTENDERS
from tests.bench.migrate.hosts import LINKS
from tests.support.processes import run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")


def measure(directory: Path, *words: str) -> str:
    """The page of a short run; what it said on the way is shown when it fails."""
    page = directory / "page.md"
    short = ("--size=16M", "--rounds=1", "--seconds=0.2", f"--directory={directory}", f"--output={page}")
    done = run(sys.executable, "-m", "tests.bench.migrate", *short, *words, seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert page.read_text() == done.stdout
    assert [path.name for path in directory.iterdir()] == ["page.md"]
    return done.stdout


@pytest.mark.representative
def test_a_guest_is_moved_over_a_long_link_and_what_it_saw_is_told(tmp_path: Path) -> None:
    text = measure(tmp_path, "--contender=postcopy", "--link=20 ms")
    assert "## 1 Gbit/s, 20 ms of round trip, " in text
    assert sum(line.startswith("| postcopy ") for line in text.splitlines()) == 3
    assert "postcopy: longest time without an answer to the guest, s" in text
    assert "failed" not in text


@pytest.mark.exhaustive
def test_every_contender_moves_it_over_every_link(tmp_path: Path) -> None:
    text = measure(tmp_path)
    assert text.count("\n## ") == len(LINKS)
    for each in CONTENDERS:
        rows = sum(line.startswith(f"| {each.name} ") for line in text.splitlines())
        assert rows == (1 + 2 * len(LINKS) if each.is_there else 0)
    assert text.count("postcopy: window, as a multiple of stock's") == len(LINKS)
