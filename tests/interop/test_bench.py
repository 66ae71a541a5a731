"""The benchmark runs: that it cannot rot. How fast anything is, is not tested here."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.bench.contenders import CONTENDERS
from tests.bench.fillers import NBD_OVERLAY
from tests.bench.rows import ROWS
from tests.bench.versions import HERE, checked_out
from tests.support.processes import check, run

ROW = "1 MiB sequential read, depth 8, Unix socket"
CHOSEN = "depth 8, Unix socket"


@pytest.mark.exhaustive
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


@pytest.mark.parametrize("least", ["0", "1e9"])
def test_two_versions_are_compared_and_what_is_slower_than_asked_for_fails(least: str) -> None:
    options = ("--rounds=1", "--seconds=0.1", "--size=8", "--row=1 MiB sequential read, depth 8, Unix")
    done = run(sys.executable, "-m", "tests.bench.quick", f"--against={HERE}", f"--least={least}", *options)
    lines = done.stdout.splitlines()
    ratio, _, rest = re.sub(r" \[\S+ to \S+\]", "", lines[1]).strip().partition("  ")
    assert float(ratio) > 0
    assert rest.startswith("1 MiB sequential read, depth 8, Unix socket: ")
    assert done.returncode == (0 if least == "0" else 1), done.stdout
    assert lines[2:] == ([] if least == "0" else [f"slower than 1e+09 of before: {ROW}"])


def test_the_stream_is_compared_too_and_a_revision_is_checked_out_for_it(tmp_path: Path) -> None:
    with checked_out("HEAD", tmp_path) as version:
        assert version.tree.parent == tmp_path
        assert check(*version.command("nbd-overlay"), "--version") == check(NBD_OVERLAY, "--version")
    assert not version.tree.exists()
    options = ("--rounds=1", "--seconds=0.1", "--size=8", "--row=streaming, flat")
    printed = check(sys.executable, "-m", "tests.bench.quick", f"--against={HERE}", *options)
    assert "streaming, flat: " in printed.splitlines()[1]
