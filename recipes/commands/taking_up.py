"""A migration whose command has died, taken up from its journal by ``resume`` or ``abort``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from nbdserve.common.errors import ConnectError
from recipes.commands.retreat import OwnHands, stop
from recipes.engines.interface import image_facts
from recipes.errors import MigrationError
from recipes.hosts.interruption import completed
from recipes.hosts.quoting import pasted
from recipes.migrate.decide import Wish
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
from recipes.qemu.vm import EndedVm, connect

GRACE = 10.0
"""Seconds that a switch-over which is under way is given to come to its end."""


class TakenUpHands(OwnHands):
    """What can be done by who was not there.

    Only processes that this migration has written down are ended, when it is their turn, so that a host that
    is away keeps nobody from what is to be done on the other. An image is removed only if it holds nothing.
    """

    saw_the_end = False

    async def destination(self, limit: float | None) -> OnB:
        """Ask B's QEMU, connected to anew; where there is none, whether a guest has run there."""
        m = self._m
        found = await look(m.plan.destination.qmp, limit or m.plan.limits.connect)
        if found is not OnB.NONE:
            return found
        try:
            # Nobody listens at its address: the way to it may be lost, and not the process.
            if await m.adopt_known(Role.QEMU):
                return OnB.SILENT
            return OnB.STOPPED if await self._holds_something() else OnB.NONE
        except MigrationError:
            return OnB.SILENT

    async def _holds_something(self) -> bool:
        m = self._m
        image, limit = m.plan.destination.image, m.plan.limits.command
        if m.state.phase in BEFORE_IMAGE or not await m.host_b.test("-e", image, limit):
            return False
        facts = await image_facts(m.host_b, image, limit)
        if "backing-filename" in facts and "local-size" not in facts:
            raise MigrationError(f"{image} on B does not tell how much of the disk it holds")
        return "backing-filename" not in facts or bool(facts["local-size"])

    def lost(self, words: str) -> str:
        """Say what is not known, too."""
        address, name = self._m.plan.source.qmp, self._m.state.name
        return (
            f"no QEMU is at A's monitor ({address}): if it has ended, its guest is gone with it, and its "
            f"disk is untouched; then: nbd-migrate cleanup {name}; if only the way there is lost, see to "
            f"that, and then: nbd-migrate abort {name}"
        )

    async def end_destination(self) -> None:
        """End B's QEMU, if it is the one that was started."""
        await stop(self._m, self._m.qemu or await self._m.adopt_known(Role.QEMU))

    async def clear(self) -> list[str]:
        """End what still lives and remove what was made; return a phrase for each thing that is left."""
        m, left = self._m, []
        for role in (Role.QEMU, Role.OVERLAY, Role.SERVER, Role.FENCE):
            try:
                await stop(m, await m.adopt_known(role))
            except MigrationError as error:
                left.append(str(error))
        if m.state.removal:
            image, limit = m.plan.destination.image, m.plan.limits.command
            left += await remove(m.host_b, (m.host_b.tool("nbd-overlay"), "discard", image), limit)
            rest = tuple(word for word in m.state.removal if word not in (image, f"{image}.map"))
            if not left and rest[0] == "rm":
                left += await remove(m.host_b, rest, limit)
        return left


BEFORE_IMAGE = frozenset({Phase.PREPARED, Phase.EXPORT})
"""There is no image of this migration on B yet."""


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
        way = WayBack(TakenUpHands(self.m), self.state, wish=wish, grace=GRACE)
        going = asyncio.ensure_future(way.go())
        try:
            return await completed(going)
        except asyncio.CancelledError:
            if not going.cancelled():
                self.m.report.note(f"interrupted; {going.result().where}")
            raise

    async def clear(self) -> list[str]:
        """Try once more to clear away what was left of a migration that is over."""
        if self.state.phase not in (Phase.TAKEN_BACK, Phase.LOST) or self.state.is_clear:
            return []
        left = await TakenUpHands(self.m).clear()
        if not left:
            self.m.record(removal=(), processes=())
        return left


def by_hand(state: State) -> str:
    """What the operator does where nobody but him can know what is right."""
    look = [
        pasted(["nbd-migrate", "qmp", address, query])
        for address, query in (
            (state.plan.source.qmp, "query-migrate"),
            (state.plan.source.qmp, "query-status"),
            (state.plan.destination.qmp, "query-status"),
        )
    ]
    return (
        f"look who has the guest: {'; '.join(look)}; then resume or abort again, or see to it by hand and "
        f"forget the migration: nbd-migrate cleanup --force {state.name}"
    )


@asynccontextmanager
async def taken_up(name: str, report: Report) -> AsyncIterator[TakenUp]:
    """Take a migration up. Raises JournalBusyError, or MigrationError where there is none."""
    journal = Journal.take_over(name)
    try:
        if journal.state is None:
            raise MigrationError(f"{name}: nothing was begun")
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
