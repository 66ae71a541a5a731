"""The page of decisions in the docs."""

from __future__ import annotations

from pathlib import Path

from recipes.migrate.decide import RULES
from tests.support.decisions import TESTS, page

ROOT = Path(__file__).resolve().parents[4]


def test_the_page_of_decisions_is_what_make_docs_writes() -> None:
    assert (ROOT / "docs/decisions.md").read_text() == page(), "run make docs"


def test_the_tests_that_it_names_are_there() -> None:
    assert set(TESTS) <= {rule.name for rule in RULES}
    for file, test in TESTS.values():
        assert f"def {test}(" in (ROOT / f"tests/vm/test_migrate_{file}.py").read_text(), test
