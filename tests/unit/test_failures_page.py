"""docs/failures.md has every component at every time, each with its tests or the reason why there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.failures import Component, When, page
from tests.support.failures_data import COMPONENTS

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_make_docs_writes() -> None:
    assert (ROOT / "docs/failures.md").read_text() == page(), "run make docs"


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda each: each.name)
def test_each_time_is_there_once(component: Component) -> None:
    times = [when for cell in component.cells for when in cell.when]
    assert sorted(times, key=list(When).index) == list(When)


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda each: each.name)
def test_each_cell_has_tests_that_are_there_or_a_reason(component: Component) -> None:
    for cell in component.cells:
        assert cell.tests or cell.why_not, cell.when
        for named in cell.tests:
            file, _, test = named.partition("::")
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), named


def test_no_cell_breaks_its_table() -> None:
    lines = [line for line in page().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {7}
