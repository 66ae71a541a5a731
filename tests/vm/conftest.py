"""Migrations of a test are known to that test alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the journals beside the test's own directory; by that name its guards are found."""
    home = tmp_path.with_name(f"{tmp_path.name}.state")
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    yield
    shutil.rmtree(home, ignore_errors=True)
