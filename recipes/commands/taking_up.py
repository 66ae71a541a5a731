"""A migration whose command has died, taken up from its journal by ``resume`` or ``abort``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

from nbdserve.common.errors import ConnectError
from recipes.commands.retreat import OwnHands, stop
from recipes.errors import MigrationError
from recipes.hosts.interruption import undisturbed
from recipes.migrate.decide import Wish, told
from recipes.migrate.journal import Journal
from recipes.migrate.leftovers import remove
from recipes.migrate.report import Report
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase, Role, State
from recipes.migrate.way_back import Verdict, WayBack
from recipes.plans.reaching import hosts
from recipes.processes.children import Children
from recipes.qemu.destination import look
from recipes.qemu.facts import OnB
from recipes.qemu.vm import EndedVm, VmGoneError, connect

GRACE = 10.0
"""Seconds that a switch-over which is under way is given to come to its end."""


BEFORE_LAUNCH = frozenset({Phase.PREPARED, Phase.EXPORT, Phase.OVERLAY})
"""Whatever listens at the address of B's monitor is not ours."""


class TakenUpHands(OwnHands):
    """What can be done by who was not there: processes are found again when they are to be ended.

    So a host that is away keeps nobody from what is to be done on the other.
    """

    async def destination(self, limit: float | None) -> OnB:
        """Ask B's QEMU, connected to anew."""
        plan = self._m.plan
        return await look(plan.destination.qmp, limit or plan.limits.connect)

    async def end_destination(self) -> None:
        """End B's QEMU, by its monitor where nobody knows its process id."""
        m = self._m
        await stop(m, m.qemu or await m.adopt(Role.QEMU))
        if m.qemu or m.state.phase in BEFORE_LAUNCH or await self.destination(None) is not OnB.WAITS:
            return
        limit = m.plan.limits.connect
        b = await connect("B's QEMU", m.plan.destination.qmp, limit=limit, command_limit=limit)
        try:
            with suppress(VmGoneError):
                await b.execute("quit")
        finally:
            await b.disconnect()

    async def clear(self) -> list[str]:
        """End what still lives and remove what was made; return a phrase for each thing that is left."""
        m, left = self._m, []
        roles = (Role.OVERLAY, Role.SERVER, Role.FENCE)
        ends: list[Callable[[], Awaitable[None]]] = [partial(self._end, role) for role in roles]
        for end in (self.end_destination, *ends):
            try:
                await end()
            except (MigrationError, ConnectError) as error:
                left.append(str(error))
        if m.state.removal:
            left += await remove(m.host_b, m.state.removal, m.plan.limits.command)
        return left

    async def _end(self, role: Role) -> None:
        await stop(self._m, await self._m.adopt(role))


@dataclass
class TakenUp:
    """A migration that is in our hands now."""

    m: Migration

    @property
    def state(self) -> State:
        """What it has come to."""
        return self.m.state

    async def decide(self, wish: Wish) -> Verdict:
        """Look, decide, and do what leads back to A if that was decided."""
        way = WayBack(TakenUpHands(self.m), self.state.phase, self.state.capabilities, wish=wish, grace=GRACE)
        return await undisturbed(way.go())

    def told(self, verdict: Verdict) -> str:
        """What the operator reads of it."""
        return told(verdict.where, self.state) if "{" in verdict.decision.words else verdict.where


@asynccontextmanager
async def taken_up(name: str, report: Report) -> AsyncIterator[TakenUp]:
    """Take a migration up. Raises JournalBusyError, or MigrationError where there is none."""
    journal = Journal.take_over(name)
    try:
        if journal.state is None:
            raise MigrationError(f"nothing was begun: nbd-migrate cleanup {name} removes what is known of it")
        plan = journal.state.plan
        places = await hosts(plan)
        limits = plan.limits
        try:
            a = await connect("A's QEMU", plan.source.qmp, limit=limits.connect, command_limit=limits.command)
        except ConnectError:
            # It is looked for again before anything is decided.
            a = EndedVm("A's QEMU")
        async with Children() as children:
            m = Migration(journal, places, report, children, None, a, owned=False)
            m.no_longer_need("A's QEMU")
            try:
                yield TakenUp(m)
            finally:
                await m.close()
    finally:
        journal.close()
