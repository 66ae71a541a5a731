"""docs/conformance.md promises a test for every item of the protocol: they must be there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "conformance.md"
COLUMNS = 6


def rows() -> list[list[str]]:
    """The cells of every row of every table, without the headings."""
    lines = [line.strip().strip("|") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in cells if row[0] != "item" and set(row[0]) != {"-"}]


def test_every_row_has_all_cells_and_says_what_nbdserve_does() -> None:
    assert len(rows()) > 60
    for row in rows():
        assert len(row) == COLUMNS, row
        assert all(row), row


def test_every_test_that_the_page_of_conformance_names_exists() -> None:
    for item, *_, tests, _, _, _ in rows():
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", tests)
        assert named or tests.startswith("none: "), f"{item}: no test"
        for file, test in named:
            (found,) = (path for path in (ROOT / "tests").rglob(Path(file).name) if str(path).endswith(file))
            assert f"def {test}(" in found.read_text(), f"{item}: {file} has no {test}"
