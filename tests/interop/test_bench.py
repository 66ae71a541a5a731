"""The benchmark runs: that it cannot rot. How fast anything is, is not tested here."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.bench.contenders import CONTENDERS
from tests.bench.rows import ROWS
from tests.support.processes import check

CHOSEN = "depth 8, Unix socket"


def test_the_benchmark_writes_a_page_with_a_figure_for_every_server(tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    rows = [row for row in ROWS if CHOSEN in row.name]
    assert {row.writes for row in rows} == {False, True}
    printed = check(
        sys.executable, "-m", "tests.bench", "--quick", f"--row={CHOSEN}", f"--output={page}", seconds=100
    )
    text = page.read_text()
    assert printed == text
    for row in rows:
        lines = text.partition(f"## {row.name}\n")[2].splitlines()[3 : 3 + len(CONTENDERS)]
        figures = {line.split(" | ")[0].strip("| "): line.split(" | ")[1].strip(" †") for line in lines}
        assert list(figures) == [contender.name for contender in CONTENDERS]
        assert all(float(figure) > 0 for figure in figures.values())
        for peer, least in row.targets.items():
            assert f"Target ≥ {least:g} × {peer}: " in text
