"""A migration in which processes are struck at one moment.

    python -m tests.support.doomed PLAN MOMENT ROLE[+ROLE...] SIGNAL

MOMENT is the name of a Step (when it begins) or of a Moment, PROGRESS, or PRECOPY before it; ROLE is a Role's
name. Then the migration goes on, if it can, exactly as that of ``nbd-migrate run`` does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import psutil

from nbdserve.common import clock, program
from recipes.cli.journal_commands import until_signal
from recipes.commands.run import migrate
from recipes.hosts.quoting import pasted
from recipes.migrate.console import PlainReport
from recipes.migrate.progress import Moment, PrecopyProgress, Progress, Step
from recipes.plans.planfile import load
from tests.support.processes import wait_until
from tests.support.vms import Role, lives

DEATH = 5.0
"""Seconds until a process that was killed is gone."""


class Doom(PlainReport):
    """Strikes once, in the middle of the report."""

    def __init__(self, moment: str, victims: list[Role], number: signal.Signals, directory: Path) -> None:
        super().__init__()
        self._moment = moment
        self._victims = victims
        self._number = number
        self._directory = directory

    def step_started(self, step: Step) -> None:
        super().step_started(step)
        self._strike(step.name)

    def moment(self, moment: Moment) -> None:
        super().moment(moment)
        self._strike(moment.name)

    def progress(self, progress: Progress) -> None:
        super().progress(progress)
        self._strike("PROGRESS")

    def precopy(self, progress: PrecopyProgress) -> None:
        super().precopy(progress)
        self._strike("PRECOPY")

    def _strike(self, moment: str) -> None:
        if moment != self._moment:
            return
        self._moment = ""
        struck = []
        for victim in self._victims:
            found = victim.find(self._directory) if victim is not Role.ORCHESTRATOR else []
            assert found or victim is Role.ORCHESTRATOR, f"there is no {victim.name}"
            struck += found
        for process in struck:
            # A supervisor goes by itself when what it had is gone.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(self._number)
        if self._number == signal.SIGKILL:
            wait_until(lambda: not any(lives(process.pid) for process in struck), "they are dead", DEATH)
        if Role.ORCHESTRATOR in self._victims:
            os.kill(os.getpid(), self._number)


def main(plan: str, moment: str, roles: str, number: str) -> int:
    """Run the migration as the command does."""
    victims = [Role[name] for name in roles.split("+")]
    finish = pasted([str(Path(sys.executable).with_name("nbd-migrate")), "finish", plan])
    doom = Doom(moment, victims, signal.Signals[number], Path(plan).parent)

    def body() -> int:
        return clock.run(until_signal(migrate(load(Path(plan)), doom, finish=finish)))

    return program.run("nbd-migrate", body)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
