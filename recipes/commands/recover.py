"""``nbd-migrate recover``: a guest whose QEMU on B, or B itself, has died while A was needed, boots again.

Its disk is the overlay on B and A's image together: what it had flushed is there, as after a power failure.
On B that goes on as ``finish --boot`` does it. On A what it wrote on B is written to A's image first
(recipes/recovering/committing.py), and from then on there is no way but that to its end.
"""

from __future__ import annotations

import asyncio

from recipes.commands.finish import finish_with
from recipes.commands.taking_up import TakenUp, taken_again, taken_up
from recipes.errors import MigrationError
from recipes.migrate.decide import Action, Wish
from recipes.migrate.progress import Report
from recipes.recovering.booting import boot_on_a
from recipes.recovering.committing import again, clear, commit


async def recover(
    name: str,
    report: Report,
    *,
    on_a: bool = False,
    copies: str = "",
    b_is_off: bool = False,
    boot: bool = True,
) -> None:
    """Boot the guest again, on B or on A; without ``boot`` only its disk is made whole there.

    It is refused where the guest is, or may be, somewhere. ``copies`` is a directory on A with B's files;
    ``b_is_off`` says that host B need not be asked. Raises MigrationError, whose line says what is safe and
    what to do.
    """
    async with taken_up(name, report) as migration:
        verdict = await migration.decide(Wish.ON_A if on_a else Wish.ON_B, b_is_off=b_is_off)
        state = migration.state
        if verdict.action is Action.KEEP:
            raise MigrationError(f"{verdict.where}; nothing was touched")
        if on_a:
            await recover_on_a(migration, verdict.action, copies, b_is_off=b_is_off)
            if boot:
                await boot_on_a(migration.m)
            return
        if verdict.action is Action.NOTHING:
            raise MigrationError(f"{verdict.where}; to start it there: nbd-migrate recover {name} --on a")
    journal = taken_again(state, unwritten=migration.m.journal.unwritten)
    await finish_with(journal, state.plan, report, boot=boot, again=state.finish, sure=True)


async def recover_on_a(migration: TakenUp, action: Action, copies: str, *, b_is_off: bool) -> None:
    """Make A's images the guest's disks, as far as that is not done."""
    m = migration.m
    try:
        if action is Action.COMMIT:
            await commit(m, copies, b_is_off=b_is_off)
        if action is Action.COMMIT or not m.state.is_clear:
            await clear(m, b_is_off=b_is_off)
    except asyncio.CancelledError:
        m.report.note(f"interrupted; to go on: {again(m, copies, b_is_off)}")
        raise
    if m.a.connected:
        raise MigrationError(f"a QEMU is at A's monitor already, {m.plan.source.qmp}: it is not started")
