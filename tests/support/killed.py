"""Commands that are killed in the very call that makes an entry of their journal durable."""

from __future__ import annotations

import contextlib

import psutil

from recipes.migrate import journal
from recipes.migrate.state import Phase
from tests.support.processes import Process, run, wait_until
from tests.support.vms import NBD_MIGRATE, Scene

SECONDS = 60.0
NAME = "vm"


def command(*words: str) -> tuple[int, str]:
    """Run a subcommand of nbd-migrate; its exit code, and what it said."""
    done = run(NBD_MIGRATE, *words, seconds=SECONDS)
    return done.returncode, done.stdout + done.stderr


def traced(stage: Scene, *options: str, call: str = "fsync") -> Process:
    """A run some of whose system calls are traced."""
    strace = ["strace", "-qq", "-e", f"trace={call}", *options]
    argv = [*strace, str(NBD_MIGRATE), "run", str(stage.plan_file()), "--name", NAME]
    return Process(argv, stage.directory / "run.log")


def kill_at(stage: Scene, entry: int, *, guards: bool, call: str = "fsync") -> Phase:
    """Kill the command of a run at this entry, with its guards or not; return the last phase written."""
    kill = f"inject={call}:signal=KILL:when={entry}"
    with traced(stage, "-o", "/dev/null", "-e", kill, call=call) as tracer:
        stopped: set[int] = set()

        def has_ended() -> bool:
            """Guards that are stopped do not act before they are dead."""
            if guards:
                for process in _guards(tracer.pid):
                    if process.pid not in stopped:
                        process.suspend()
                        stopped.add(process.pid)
            return not tracer.running

        wait_until(has_ended, "the command is killed", SECONDS)
        phase = journal.last(NAME).phase
        for pid in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(pid).kill()
    wait_until(lambda: journal.actor(NAME) == 0, "nobody is at work", SECONDS)
    return phase


def _guards(tracer: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        found = [each for child in psutil.Process(tracer).children() for each in child.children()]
        return [each for each in found if "recipes.migrate.guard" in " ".join(each.cmdline())]
    return []
