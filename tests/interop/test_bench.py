"""The benchmark runs: that it cannot rot. How fast anything is, is not tested here."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.bench.contenders import CONTENDERS
from tests.support.processes import check


def test_the_benchmark_writes_a_page_with_a_figure_for_every_server(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    printed = check(
        sys.executable, "-m", "tests.bench", "--quick", "--row=sequential", f"--output={page}", seconds=100
    )
    text = page.read_text()
    for heading in ("## 1 MiB sequential read, depth 16", "## 1 MiB sequential write, depth 16"):
        lines = text.partition(heading)[2].splitlines()[4 : 4 + len(CONTENDERS)]
        figures = {line.split(" | ")[0].strip("| "): line.split(" | ")[1].strip(" †") for line in lines}
        assert list(figures) == [contender.name for contender in CONTENDERS]
        assert all(float(figure) > 0 for figure in figures.values())
        assert heading in printed
    assert "Target ≥ 1.5 × nbdkit: " in text
