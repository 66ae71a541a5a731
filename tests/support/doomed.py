"""A migration in which one process is struck at one moment.

    python -m tests.support.doomed PLAN MOMENT ROLE SIGNAL

MOMENT is the name of a Step (when it begins) or of a Moment, or PROGRESS; ROLE is a Role's name. Then the
migration goes on, if it can, exactly as that of ``nbd-migrate run`` does.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from nbdserve import clock, command
from recipes.cli import until_signal
from recipes.console import PlainReport
from recipes.planfile import load
from recipes.report import Moment, Progress, Step
from tests.support.processes import wait_until
from tests.support.vms import Role, lives

DEATH = 5.0
"""Seconds until a process that was killed is gone."""


class Doom(PlainReport):
    """Strikes once, in the middle of the report."""

    def __init__(self, moment: str, victim: Role, number: signal.Signals, directory: Path) -> None:
        super().__init__()
        self._moment = moment
        self._victim = victim
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

    def _strike(self, moment: str) -> None:
        if moment != self._moment:
            return
        self._moment = ""
        if self._victim is Role.ORCHESTRATOR:
            os.kill(os.getpid(), self._number)
            return
        struck = self._victim.find(self._directory)
        assert struck, f"there is no {self._victim.name}"
        for process in struck:
            process.send_signal(self._number)
        if self._number == signal.SIGKILL:
            wait_until(lambda: not any(lives(process.pid) for process in struck), "they are dead", DEATH)


def main(plan: str, moment: str, role: str, number: str) -> int:
    """Run the migration as the command does."""
    doom = Doom(moment, Role[role], signal.Signals[number], Path(plan).parent)
    return command.run("nbd-migrate", lambda: clock.run(until_signal(load(Path(plan)), doom)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
