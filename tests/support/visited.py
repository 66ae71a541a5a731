"""A migration to which somebody comes in the instant before A's QEMU is told to migrate.

    python -m tests.support.visited PLAN

Makes the file ``begins`` beside the plan then, and goes on when there is a file ``come``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nbdserve.common import clock, program
from recipes.cli.journal_commands import until_signal
from recipes.commands.run import migrate
from recipes.migrate.console import PlainReport
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase
from recipes.plans.planfile import load
from tests.support.processes import wait_until


def main(plan: Path) -> int:
    """Run the migration as the command does."""
    enter = Migration.enter

    def visited(m: Migration, phase: Phase, *, sync: bool = True, **changes: Any) -> None:
        enter(m, phase, sync=sync, **changes)
        if phase is Phase.MIGRATE:
            plan.with_name("begins").touch()
            wait_until(plan.with_name("come").exists, "a visitor", 60.0)

    Migration.enter = visited  # type: ignore[assignment, method-assign]
    return program.run("nbd-migrate", lambda: clock.run(until_signal(migrate(load(plan), PlainReport()))))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
