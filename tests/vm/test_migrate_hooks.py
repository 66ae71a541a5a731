"""The operator's hooks in a whole migration: when they are called, and what their failure does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from recipes.migrate import journal
from recipes.migrate.state import Phase
from tests.support.processes import run, wait_until
from tests.support.vms import NBD_MIGRATE, Role, Scene, running

SECONDS = 60.0
HOOKS = ("before_cutover", "after_cutover", "done", "failed")

HOOK = """#!/bin/sh
# Keeps what it is given; a file beside it says what else it does.
cat > {directory}/$1.json
echo $1 >> {directory}/called
if [ -e {directory}/$1.does ]; then . {directory}/$1.does; fi
"""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A guest that runs on A, a plan with every hook, and a journal of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    directory = tmp_path / "hosts"
    directory.mkdir()
    made = Scene(directory)
    hook = directory / "hook"
    hook.write_text(HOOK.format(directory=directory))
    hook.chmod(0o755)
    made.change("hooks", **{name: (str(hook), name) for name in HOOKS})
    with running(made):
        yield made


def called(stage: Scene) -> list[str]:
    """The hooks that were called, in order."""
    path = stage.directory / "called"
    return path.read_text().split() if path.exists() else []


def does(stage: Scene, hook: str, script: str) -> None:
    """From now on a hook does this, too."""
    (stage.directory / f"{hook}.does").write_text(script)


def given(stage: Scene, hook: str, key: str) -> object:
    """What a hook was told."""
    return json.loads((stage.directory / f"{hook}.json").read_text())[key]


def runs_hook(stage: Scene) -> bool:
    """Whether a hook runs."""
    hook = str(stage.directory / "hook")
    return any(hook in (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


@pytest.mark.representative
def test_hooks_are_called_in_their_places(stage: Scene) -> None:
    with stage.run() as migration:
        assert migration.wait(SECONDS) == 0, migration.output()
    assert called(stage) == ["before_cutover", "after_cutover", "done"]
    assert [given(stage, hook, "phase") for hook in called(stage)] == ["launch", "arrived", "done"]
    assert given(stage, "done", "arrival")
    assert not re.search(r"hook (before|after|done|failed)", migration.output())


@pytest.mark.representative
def test_where_the_first_one_fails_the_guest_stays_on_a(stage: Scene) -> None:
    does(stage, "before_cutover", "echo not tonight; exit 1")
    with stage.run() as migration:
        assert migration.wait(SECONDS) == 1
    last = migration.output().splitlines()[-1]
    assert "step 4 (migrate): hook before_cutover ended with code 1: not tonight; its output is in " in last
    assert last.endswith("; the guest runs on A as before")
    assert called(stage) == ["before_cutover", "failed"]
    assert given(stage, "failed", "phase") == "taken-back"
    assert "not tonight" in str(given(stage, "failed", "reason"))
    stage.wait_until_guest_works("a")
    wait_until(lambda: not stage.started(), "nothing is left", SECONDS)
    assert stage.capabilities_of_a() == []


def test_the_failure_of_the_others_is_only_told(stage: Scene) -> None:
    stage.change("limits", hook=1.0)
    does(stage, "after_cutover", "exec sleep 1000")
    does(stage, "done", "exec 2>&1; cd /nowhere && true")
    with stage.run() as migration:
        assert migration.wait(SECONDS) == 0, migration.output()
    assert "hook after_cutover has not ended within 1 s (limits.hook), and was killed" in migration.output()
    assert "hook done ended with code" in migration.output()
    stage.wait_until_guest_works("b")
    assert called(stage) == ["before_cutover", "after_cutover", "done"]


@pytest.mark.parametrize("hook", ["after_cutover", "done"])
def test_one_in_which_the_command_was_killed_is_called_again(stage: Scene, hook: str) -> None:
    does(stage, hook, "sleep 600")
    stage.change("limits", hook=600.0)
    with stage.run() as migration:
        wait_until(lambda: hook in called(stage), "it is called", SECONDS)
        if hook == "after_cutover":
            wait_until(lambda: journal.last("a").phase is not Phase.ARRIVED, "the stream begins", SECONDS)
        migration.kill()
    wait_until(lambda: not runs_hook(stage), "it has ended with it", SECONDS)
    (stage.directory / f"{hook}.does").unlink()
    done = run(NBD_MIGRATE, "resume", "a", seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    assert f"hook {hook} was interrupted before, and is called again" in done.stdout
    assert called(stage) == ["before_cutover", *sorted(["after_cutover", "done", hook])]
    again = run(NBD_MIGRATE, "resume", "a", seconds=SECONDS)
    assert (again.returncode, called(stage)[3:]) == (0, called(stage)[3:])


def test_who_gives_a_migration_up_is_told_on(stage: Scene) -> None:
    does(stage, "before_cutover", "sleep 600")
    stage.change("limits", hook=600.0)
    with stage.run() as migration:
        wait_until(lambda: called(stage) == ["before_cutover"], "it is called", SECONDS)
        for guard in Role.GUARD.find(stage.directory):
            guard.kill()
        migration.kill()
    wait_until(lambda: not runs_hook(stage), "it has ended with it", SECONDS)
    wait_until(lambda: journal.actor("a") == 0, "nobody is at work", SECONDS)
    done = run(NBD_MIGRATE, "abort", "a", seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    assert called(stage) == ["before_cutover", "failed"]
    assert str(given(stage, "failed", "reason")).startswith("given up by abort: ")


def test_a_hook_that_is_not_there_is_noticed_before_anything_begins(stage: Scene) -> None:
    stage.change("hooks", failed=("/nowhere/hook",))
    with stage.run() as migration:
        assert migration.wait(SECONDS) == 2
    assert "hooks.failed: there is no program /nowhere/hook on this host" in migration.output()
    assert called(stage) == []
