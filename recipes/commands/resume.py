"""``nbd-migrate resume``: what a command that has died has left to do, wherever it had come to."""

from __future__ import annotations

from contextlib import AsyncExitStack, closing
from dataclasses import replace

from recipes.commands.finish import finish_with
from recipes.commands.readdress import move_source
from recipes.commands.run import migrate_from
from recipes.commands.taking_up import by_hand, taken_again, taken_up
from recipes.errors import MigrationError
from recipes.migrate.decide import Action, Wish
from recipes.migrate.journal import Journal
from recipes.migrate.progress import Report
from recipes.migrate.state import Phase, State
from recipes.plans.hooks import Hook
from recipes.plans.plan import Plan
from recipes.plans.reaching import hosts, source_monitor
from recipes.running.hooks import tell


async def resume(
    name: str,
    report: Report,
    *,
    boot: bool = False,
    verify: bool | None = None,
    source_address: str | None = None,
) -> None:
    """Go on with a migration that nobody acts on any more: begin anew on A, or do what is left on B.

    ``boot`` starts the guest again where it has ended on B; ``verify`` wins over the plan; A is at
    ``source_address`` now, if that is given. Raises MigrationError, whose line says where the guest is
    and what to do.
    """
    if source_address is not None:
        await move_source(name, source_address, report)
    async with taken_up(name, report) as migration:
        verdict = await migration.decide(Wish.GO_ON)
        state, said, unwritten = migration.state, verdict.where, migration.m.journal.unwritten
        if verdict.action is Action.NOTHING and state.phase is Phase.DONE:
            # The command may have died between the two.
            await tell(migration.m, Hook.DONE)
    if verdict.action is Action.KEEP:
        raise MigrationError(f"{said}; {by_hand(state)}")
    if verdict.action is Action.START_OVER and unwritten:
        raise MigrationError(f"{said}; the journal cannot be written: {unwritten}; then resume again")
    if verdict.action is Action.START_OVER and not state.is_clear:
        raise MigrationError(f"{said}; when that is mended: nbd-migrate resume {name}")
    plan = state.plan
    if verify is not None:
        plan = replace(plan, finish=replace(plan.finish, verify=verify))
    # A guest whose disk is complete may have ended since.
    boots = boot and state.phase is Phase.DONE
    if boot and state.phase is Phase.RECOVERED:
        raise MigrationError(f"{said}; to start it there: nbd-migrate recover {name} --on a")
    if verdict.action is Action.NOTHING and not boots:
        report.note(said)
    elif verdict.action in (Action.FINISH, Action.NOTHING):
        await finish_with(
            *(taken_again(state, unwritten=unwritten), plan, report),
            boot=boot,
            again=state.finish,
            sure=True,
            moved=source_address is not None,
        )
    else:
        report.note(f"{said}; the migration begins anew")
        await start_over(name, plan, state, report)


async def start_over(name: str, plan: Plan, state: State, report: Report) -> None:
    """Run the six steps once more, under the same name."""
    async with AsyncExitStack() as stack:
        journal = stack.enter_context(closing(Journal.begin(name)))
        places = await stack.enter_async_context(hosts(plan))
        a = await source_monitor(plan, places[0])
        stack.push_async_callback(a.disconnect)
        finish, by = state.finish, state.finish_by
        await migrate_from(plan, report, journal, places, a, stack, None, finish, by)
