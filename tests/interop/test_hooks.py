"""The operator's hooks, as real programs: right ones, and those that fail, hang, fork, print for ever."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from recipes.errors import MigrationError
from recipes.migrate.journal import HOOKS_LOG
from recipes.migrate.progress import Report
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase
from recipes.plans.hooks import Hook, Hooks
from recipes.running import hooks
from tests.support.journals import begun
from tests.support.processes import PATIENCE, wait_until

LONG = 60.0 * PATIENCE


class Notes(Report):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Migrating:
    """As much of a migration as a hook needs, with a real journal."""

    def __init__(
        self, directory: Path, hook: Hook, script: str, limit: float = LONG, shebang: str = ""
    ) -> None:
        self.program = directory / "hook"
        self.program.write_text(f"{shebang or '#!/bin/sh'}\n{script}\n")
        self.program.chmod(stat.S_IRWXU)
        self.journal = begun(directory, "/a", Phase.LAUNCH)
        self.report = Notes()
        state = self.state
        given = Hooks(**{hook.value: (str(self.program), "a word")})
        plan = replace(state.plan, hooks=given, limits=replace(state.plan.limits, hook=limit))
        self.record(plan=plan)

    @property
    def state(self) -> Any:
        return self.journal.state

    @property
    def plan(self) -> Any:
        return self.state.plan

    def record(self, **changes: Any) -> None:
        self.journal.append(replace(self.state, **changes))

    @property
    def log(self) -> str:
        """What is in the log of hooks."""
        return (self.journal.directory / HOOKS_LOG).read_text(errors="replace")

    def call(self, hook: Hook, reason: str = "") -> None:
        """Call it."""
        self.during(hooks.call(cast(Migration, self), hook, reason))

    def tell(self, hook: Hook) -> None:
        """Call one whose failure is only told."""
        self.during(hooks.tell(cast(Migration, self), hook))

    def during(self, work: Awaitable[None]) -> None:
        """Do that, for a limited time."""

        async def body() -> None:
            async with asyncio.timeout(LONG):
                await work

        asyncio.run(body())


@pytest.mark.parametrize("hook", Hook)
def test_a_hook_is_given_the_state(hook: Hook, tmp_path: Path) -> None:
    made = Migrating(tmp_path, hook, f'cat > {tmp_path}/given; echo "$1 is what I got"')
    made.call(hook, "no reason")
    given = json.loads((tmp_path / "given").read_text())
    assert (given["hook"], given["reason"], given["name"]) == (hook.value, "no reason", "vm")
    assert given["phase"] == "launch"
    assert given["disks"][0]["size"] == 1 << 20
    assert f"{hook.value}: {made.program} 'a word': ended with code 0\na word is what I got\n" in made.log
    assert (made.state.hooks_begun, made.state.hooks_ended) == ((hook,), (hook,))
    assert made.report.said == []


def test_the_journal_says_that_it_is_called_before_it_is(tmp_path: Path) -> None:
    made = Migrating(tmp_path, Hook.DONE, "")
    made.program.write_text(
        f"#!{sys.executable}\n"
        "import json\n"
        f"line = open({str(made.journal.directory / 'journal')!r}).readlines()[-1]\n"
        "state = json.loads(line)\n"
        "assert (state['hooks_begun'], state['hooks_ended']) == (['done'], []), line\n"
    )
    made.call(Hook.DONE)


def test_a_hook_that_has_ended_is_not_called_again(tmp_path: Path) -> None:
    made = Migrating(tmp_path, Hook.AFTER_CUTOVER, f"echo x >> {tmp_path}/calls")
    made.call(Hook.AFTER_CUTOVER)
    made.call(Hook.AFTER_CUTOVER)
    assert (tmp_path / "calls").read_text() == "x\n"


def test_one_that_tells_of_failures_is_called_each_time(tmp_path: Path) -> None:
    made = Migrating(tmp_path, Hook.FAILED, f"echo x >> {tmp_path}/calls")
    made.call(Hook.FAILED)
    made.call(Hook.FAILED)
    assert (tmp_path / "calls").read_text() == "x\nx\n"
    assert made.report.said == []


def test_one_that_was_interrupted_is_called_again_and_that_is_said(tmp_path: Path) -> None:
    made = Migrating(
        tmp_path, Hook.DONE, f"cat > {tmp_path}/given; echo x >> {tmp_path}/calls; exec sleep 1000"
    )

    async def interrupted() -> None:
        calling = asyncio.create_task(hooks.call(cast(Migration, made), Hook.DONE))
        while not (tmp_path / "calls").exists():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)
        calling.cancel()
        await asyncio.wait({calling})
        assert calling.cancelled()

    made.during(interrupted())
    assert (made.state.hooks_begun, made.state.hooks_ended) == ((Hook.DONE,), ())
    assert not running(made.program)
    assert "was interrupted\n" in made.log
    made.program.write_text(f"#!/bin/sh\necho x >> {tmp_path}/calls\n")
    made.call(Hook.DONE)
    assert (tmp_path / "calls").read_text() == "x\nx\n"
    assert made.report.said == ["hook done was interrupted before, and is called again"]
    assert made.state.hooks_ended == (Hook.DONE,)


def running(program: Path) -> list[psutil.Process]:
    """The processes of a program, and those that these have started in the same session."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(program) in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("echo first; echo no, not now; exit 3", r"ended with code 3: no, not now"),
        ("exit 1", r"ended with code 1"),
        ("echo oh >&2; kill -9 $$", r"was ended by signal 9: oh"),
        ("printf 'bell \\a and \\377'; exit 1", "ended with code 1: bell \\? and \ufffd"),
        ("exec 0<&-; sleep 0.1; exit 4", r"ended with code 4"),
        ("yes a long line | head -c 3000000; echo; echo the last; exit 5", r"ended with code 5: the last"),
    ],
)
def test_how_a_hook_fails_is_told_with_its_last_line(script: str, how: str, tmp_path: Path) -> None:
    made = Migrating(tmp_path, Hook.BEFORE_CUTOVER, script)
    with pytest.raises(MigrationError, match=rf"^hook before_cutover {how}; its output is in .*/hooks\.log$"):
        made.call(Hook.BEFORE_CUTOVER)
    assert made.state.hooks_ended == (Hook.BEFORE_CUTOVER,)
    assert len(made.log) < hooks.KEPT + 500


def test_a_hook_that_hangs_is_killed_with_all_that_it_has_started(tmp_path: Path) -> None:
    made = Migrating(
        tmp_path,
        Hook.BEFORE_CUTOVER,
        f"trap '' TERM; sh -c 'sleep 1000; : {tmp_path}' & echo so far; wait",
        0.5,
    )
    with pytest.raises(
        MigrationError, match=r"has not ended within 0\.5 s \(limits\.hook\), and was killed: so"
    ):
        made.call(Hook.BEFORE_CUTOVER)
    wait_until(lambda: not running(tmp_path), "nothing is left of it")


def test_a_hook_does_not_outlive_a_command_that_is_killed(tmp_path: Path) -> None:
    """Whoever takes the migration up calls it again, and two at once nobody has asked for."""
    script = f"sh -c 'sleep 1000; : {tmp_path}' & cat > /dev/null; echo x > {tmp_path}/called; wait"
    made = Migrating(tmp_path, Hook.DONE, script)
    pid = os.fork()
    if not pid:
        try:
            made.call(Hook.DONE)
        finally:
            os._exit(1)
    try:
        wait_until((tmp_path / "called").exists, "it is called", LONG)
        assert len(running(tmp_path)) > 1
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not running(tmp_path), "nothing is left of it", 20.0)
    finally:
        for each in running(tmp_path):
            each.kill()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_what_a_hook_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    made = Migrating(tmp_path, Hook.DONE, f"sleep 1000 & echo $! > {tmp_path}/pid")
    try:
        made.call(Hook.DONE)
        assert psutil.pid_exists(int((tmp_path / "pid").read_text()))
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_hook_that_prints_without_an_end_is_killed_and_costs_no_room(tmp_path: Path) -> None:
    made = Migrating(tmp_path, Hook.DONE, "exec yes", 1.0)
    made.tell(Hook.DONE)
    [said] = made.report.said
    assert "has not ended within 1 s" in said
    assert said.endswith(f": y; its output is in {made.journal.directory}/hooks.log")
    assert "bytes more" in made.log
    assert len(made.log) < hooks.KEPT + 500


def test_a_log_begins_anew_where_it_is_long(tmp_path: Path) -> None:
    made = Migrating(tmp_path, Hook.FAILED, "echo now")
    (made.journal.directory / HOOKS_LOG).write_text("x" * (hooks.MOST + 1))
    made.call(Hook.FAILED)
    assert made.log.endswith("now\n")
    assert len(made.log) < 500


@pytest.mark.parametrize("mode", [0o600, None])
def test_a_hook_that_is_no_program_is_told(mode: int | None, tmp_path: Path) -> None:
    made = Migrating(tmp_path, Hook.DONE, "true")
    if mode is None:
        made.program.unlink()
    else:
        made.program.chmod(mode)
    made.tell(Hook.DONE)
    [said] = made.report.said
    assert said.startswith(f"hook done: {made.program}: ")
    assert ("Permission denied" in said) or ("No such file" in said)


def test_a_failure_that_is_only_told_stops_nothing(tmp_path: Path) -> None:
    made = Migrating(tmp_path, Hook.AFTER_CUTOVER, "echo alas; exit 1")

    async def body() -> None:
        async with hooks.beside(cast(Migration, made), Hook.AFTER_CUTOVER):
            await asyncio.sleep(0)

    made.during(body())
    assert [said.partition(";")[0] for said in made.report.said] == [
        "hook after_cutover ended with code 1: alas"
    ]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(MigrationError("so it was"), "so it was"), (asyncio.CancelledError(), "interrupted")],
)
def test_a_failure_is_told_with_its_reason(error: BaseException, reason: str, tmp_path: Path) -> None:
    made = Migrating(tmp_path, Hook.FAILED, f"cat > {tmp_path}/given")

    async def body() -> None:
        async with hooks.told_of_failure(cast(Migration, made)):
            raise error

    with pytest.raises(type(error)):
        made.during(body())
    assert json.loads((tmp_path / "given").read_text())["reason"] == reason


def test_where_there_is_no_hook_nothing_is_written(tmp_path: Path) -> None:
    made = Migrating(tmp_path, Hook.FAILED, "true")
    before = made.state
    made.call(Hook.DONE)
    assert made.state is before
