"""``nbd-migrate abort``: the guest stays on A as if nothing had happened, or it is said why not.

1. The journal is taken over, so that nobody else acts (taking_up.py); B's QEMU and what the run has started
   are found again.
2. ``migration.decide`` looks who has the guest, takes the rule for it from the table (migrate/decide.py), and
   does what it says (migrate/way_back.py). Before A's QEMU was told to migrate: what was started is ended,
   and what was made on B is removed. Later: the guest goes on on A, with the capabilities that its QEMU had
   before, and B's QEMU is ended (first, where B might have the guest otherwise); then the same. Where the
   guest is B's, or nobody knows, nothing is touched.
3. Here the operator is told how that ended, and what is safe.
"""

from __future__ import annotations

from recipes.commands.taking_up import by_hand, taken_up
from recipes.errors import MigrationError
from recipes.migrate.decide import Action, Wish
from recipes.migrate.leftovers import but
from recipes.migrate.progress import Report
from recipes.migrate.state import Phase
from recipes.plans.hooks import Hook
from recipes.qemu.facts import OnA
from recipes.running.hooks import tell


async def abort(name: str, report: Report) -> None:
    """Take a migration back that nobody acts on any more.

    Raises MigrationError, whose line says where the guest is and what is safe: nothing was touched when it is
    on B, or when it is not known where it is.
    """
    async with taken_up(name, report) as migration:
        before = migration.state.phase
        verdict = await migration.decide(Wish.GO_BACK)
        said = verdict.where
        touched = "nothing was touched" if migration.state.phase is before else "B's QEMU was ended"
        if migration.state.phase is Phase.DONE and not migration.state.is_clear:
            if left := await migration.clear():
                raise MigrationError(but(said, *left))
            report.note(f"{said}; what was left of it is cleared away")
            return
        if verdict.action is Action.KEEP_B:
            raise MigrationError(f"it is too late, and {touched}: {said}")
        if verdict.action is Action.KEEP:
            raise MigrationError(f"{said}; {touched}; {by_hand(migration.state)}")
        if verdict.action is not Action.NOTHING and verdict.facts.a in (OnA.GONE, OnA.SILENT):
            raise MigrationError(said)
        if verdict.action is Action.NOTHING and (left := await migration.clear()):
            raise MigrationError(but(said, *left))
        if Hook.FAILED not in migration.state.hooks_ended:
            # The guard calls none, and whoever has failed has called it.
            await tell(migration.m, Hook.FAILED, f"given up by abort: {said}")
        if not migration.state.is_clear:
            raise MigrationError(f"{said}; when that is mended: nbd-migrate abort {name}")
        report.note(said)
