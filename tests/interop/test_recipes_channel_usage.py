"""The five recipes of the single channel: help that names every variable, and one line for each mistake."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.interop.test_recipes_usage import described
from tests.support.processes import run
from tests.support.recipes import COMMANDS, DIRECTORY, variables_of

RECIPES = sorted((DIRECTORY / "channel").glob("*.sh"))
VARIABLES = {
    "DISK": "/nonexistent/disk",
    "SIZE": "1M",
    "OVERLAY": "/nonexistent/overlay",
    "LISTEN": "127.0.0.1:0",
    "CONNECT": "127.0.0.1:1",
    "TOKEN_FILE": "/nonexistent/token",
    "SOURCE_QMP": "/nonexistent/a.qmp",
    "DESTINATION_QMP": "/nonexistent/b.qmp",
}
# Enough for each recipe to get as far as its checks.
REQUIRED = {
    1: ["OVERLAY", "SIZE"],
    2: ["OVERLAY", "LISTEN", "TOKEN_FILE"],
    3: ["OVERLAY", "DESTINATION_QMP"],
    4: ["DISK", "SOURCE_QMP", "CONNECT", "TOKEN_FILE"],
    5: ["OVERLAY", "DESTINATION_QMP"],
}


def complaint(number: int, code: int, **changes: str) -> str:
    """The one line with which a recipe fails."""
    path = f"{COMMANDS}:{os.environ['PATH']}"
    done = run(RECIPES[number - 1], "true", env={**VARIABLES, **changes, "PATH": path})
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    return done.stderr


def test_there_are_five() -> None:
    assert [recipe.name[:2] for recipe in RECIPES] == ["1-", "2-", "3-", "4-", "5-"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_help_describes_exactly_the_variables_that_are_read(recipe: Path) -> None:
    done = run(recipe, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Step {recipe.name[0]} of 5, on host ")
    assert described(done.stdout) == variables_of(recipe)


@pytest.mark.parametrize(("number", "name"), [(n, name) for n, names in REQUIRED.items() for name in names])
def test_a_variable_that_is_not_set_is_one_line(number: int, name: str) -> None:
    assert f"set {name} (see {number}-" in complaint(number, 2, **{name: ""})


def test_what_is_not_there_is_one_line() -> None:
    assert "there is no such file; make an image with nbd-overlay create" in complaint(2, 1)
    assert "nobody serves /nonexistent/overlay at /nonexistent/overlay.nbd; run step 2" in complaint(3, 1)
    assert "no monitor at /nonexistent/a.qmp" in complaint(4, 1)
    assert "nobody serves /nonexistent/overlay; run step 2" in complaint(5, 1)
