"""What was decided about a migration is done only where nobody has acted on it since."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from recipes.commands.taking_up import taken_again
from recipes.errors import MigrationError
from recipes.migrate import journal
from recipes.migrate.journal import Journal
from recipes.migrate.state import Phase
from tests.support.journals import begun


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    """The journal of a migration whose guest is on B, where all look for it."""
    kept = begun(tmp_path, "/a", Phase.STREAM)
    monkeypatch.setattr(journal, "base_directory", lambda: kept.directory.parent)
    return kept


def test_a_migration_is_taken_over_again_as_it_was_left(stream: Journal) -> None:
    state = stream.state
    assert state
    stream.close()
    taken_again(state).close()


def test_a_migration_that_another_has_ended_meanwhile_is_left_alone(stream: Journal) -> None:
    state = stream.state
    assert state
    stream.append(replace(state, phase=Phase.TAKEN_BACK))
    stream.close()
    with pytest.raises(MigrationError, match=r"somebody else has acted on migration vm .*status vm$"):
        taken_again(state)
    # It is nobody's now.
    Journal.take_over("vm").close()
    # A journal that could not be written does not say what was decided.
    taken_again(state, unwritten="no space").close()
