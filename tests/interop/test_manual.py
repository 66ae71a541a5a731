"""The page of commands in the docs."""

from __future__ import annotations

from pathlib import Path

from tests.support.manual import page

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_commands_is_what_make_docs_writes() -> None:
    assert (DOCS / "commands.md").read_text() == page(), "run make docs"
