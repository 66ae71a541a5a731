"""A migration whose command has died, taken up from its journal by ``resume`` or ``abort``."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from nbdserve.common.errors import ConnectError
from recipes.commands.retreat import OwnHands
from recipes.errors import MigrationError
from recipes.hosts.calls import HostError
from recipes.hosts.host import Host
from recipes.hosts.interruption import completed
from recipes.migrate.decide import Wish
from recipes.migrate.journal import Journal
from recipes.migrate.leftovers import end_exporter, not_ended
from recipes.migrate.progress import Report
from recipes.migrate.runtime import Migration
from recipes.migrate.state import OVER, Phase, Role, State, entered
from recipes.migrate.way_back import GRACE, Verdict, WayBack
from recipes.plans.by_hand import asking
from recipes.plans.reaching import hosts, monitor_b, source_monitor
from recipes.processes.children import Child, Children
from recipes.qemu.destination import look
from recipes.qemu.facts import OnB
from recipes.qemu.vm import EndedVm, VmGoneError

SLOW = 2.0
"""Seconds after which it is said what a host is asked that does not answer."""


class TakenUpHands(OwnHands):
    """What can be done by who was not there.

    Only processes that this migration has written down are ended, when it is their turn, so that a host that
    is away keeps nobody from what is to be done on the other.
    """

    def __init__(self, m: Migration, *, b_is_off: bool = False) -> None:
        """``b_is_off``: the operator knows that host B is off, and that nothing runs there."""
        super().__init__(m)
        self._lost: dict[Host, HostError] = {}
        self._b_is_off = b_is_off

    @property
    def saw_the_end(self) -> bool:
        """Tell that nobody was there."""
        return False

    async def destination(self, limit: float | None) -> OnB:
        """Ask B's QEMU, connected to anew; where there is none, whether a guest has run there."""
        m = self._m
        if self._b_is_off:
            return OnB.STOPPED
        found = await look(monitor_b(m.plan, m.host_b), limit or m.plan.limits.connect)
        if found is not OnB.NONE:
            return found
        with self._asking(m.host_b, "what has become of B's QEMU"):
            return await self.without_b(m.host_b, m.state)

    def lost(self, words: str, state: State) -> str:
        """Say what is not known, too."""
        address, name = state.plan.source.qmp, state.name
        return (
            f"no QEMU is at A's monitor ({address}): if it has ended, its guest is gone with it, and its "
            f"disk is untouched; then: nbd-migrate cleanup {name}; if only the way there is lost, see to "
            f"that, and then: nbd-migrate abort {name}"
        )

    async def end_destination(self) -> None:
        """End B's QEMU, if it is the one that was started, and see that nobody is there any more."""
        m = self._m
        await super().end_destination()
        # Its process may have been a prefix, as sudo, that ends alone.
        where = monitor_b(m.plan, m.host_b)
        if await look(where, m.plan.limits.connect) is not OnB.NONE:
            raise MigrationError(f"B's QEMU may still be there: its monitor at {where} does not refuse")

    async def child(self, role: Role, drive: str = "") -> Child | None:
        """Return the process in a role that is written down, if it still lives."""
        child = await super().child(role, drive)
        if child is not None or self._m.state.process(role, drive) is None:
            return child
        host = self._m.host_of(role)
        if host in self._lost:
            # It is as it was a moment ago, and each question takes its time.
            raise self._lost[host]
        try:
            with self._asking(host, f"whether {self._m.called(role, drive)} is still there"):
                return await self._m.adopt_known(role, drive)
        except HostError as error:
            self._lost[host] = error
            raise

    @contextmanager
    def _asking(self, host: Host, question: str) -> Iterator[None]:
        """Say what is waited for, and for how long, where the answer does not come at once."""
        limit, way = self._m.plan.limits.command, f" by '{shlex.join(host.shell)}'" if host.shell else ""
        words = f"asking host {host.name}{way} {question}; it has {limit:g} s to answer (limits.command)"
        later = asyncio.get_running_loop().call_later(SLOW, self._m.report.note, words)
        try:
            yield
        finally:
            later.cancel()


@dataclass
class TakenUp:
    """A migration that is in our hands now."""

    m: Migration

    @property
    def state(self) -> State:
        """Return what it has come to."""
        return self.m.state

    async def decide(self, wish: Wish, *, b_is_off: bool = False) -> Verdict:
        """Look, decide, and do what leads back to A if that was decided; ``b_is_off`` as for TakenUpHands."""
        hands = TakenUpHands(self.m, b_is_off=b_is_off)
        way = WayBack(hands, self.state, wish=wish, grace=GRACE)
        going = asyncio.ensure_future(way.go())
        try:
            return await completed(going)
        except asyncio.CancelledError:
            if not going.cancelled():
                self.m.report.note(f"interrupted; {going.result().where}")
            raise
        except MigrationError as error:
            raise MigrationError(f"{error}; {by_hand(self.state)}") from error

    async def clear(self) -> list[str]:
        """Try once more to clear away what was left of a migration that is over."""
        if self.state.phase not in OVER or self.state.is_clear:
            return []
        hands = TakenUpHands(self.m)
        left = await self._end_exporter(hands) + await hands.clear()
        if not left:
            cleared = entered(self.state, self.state.phase, cleared=True)
            kept = ("made", "processes", "certificates", "exporter", "tunnel", "tracking")
            self.m.record(**{key: getattr(cleared, key) for key in kept})
        return left

    async def _end_exporter(self, hands: TakenUpHands) -> list[str]:
        """Have A's QEMU serve its disks no more; return a phrase where that is left to be done."""
        if not (self.state.exporter or self.state.tracking):
            return []
        try:
            a = await hands.source()
            said, left = await end_exporter(a, self.state) if a else ([], [])
        except (ConnectError, VmGoneError) as error:
            return not_ended(self.state, str(error))
        for each in said:
            self.m.report.note(each)
        return left


def by_hand(state: State) -> str:
    """Return what the operator does where nobody but him can know what is right."""
    if state.phase is Phase.RECOVERING:
        return "nothing else brings it to its end"
    queries = [
        asking(there, query)
        for there, query in (
            (state.plan.source, "query-migrate"),
            (state.plan.source, "query-status"),
            (state.plan.destination, "query-status"),
        )
    ]
    return (
        f"look who has the guest: {'; '.join(queries)}; then resume or abort again, or see to it by hand and "
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
        async with hosts(plan) as places, Children() as children:
            try:
                a = await source_monitor(plan, places[0])
            except ConnectError:
                # It is looked for again before anything is decided.
                a = EndedVm("A's QEMU")
            m = Migration(journal, places, report, children, None, a, owned=False)
            m.no_longer_need("A's QEMU")
            try:
                yield TakenUp(m)
            finally:
                await m.close()
    finally:
        journal.close()


def taken_again(state: State, *, unwritten: str = "") -> Journal:
    """Take a migration over once more, to do what was decided when it had come to ``state``.

    Raises JournalBusyError, and MigrationError where somebody has acted on it meanwhile; ``unwritten`` says
    why the journal does not have that state.
    """
    journal = Journal.take_over(state.name)
    if not unwritten and (journal.state is None or journal.state.phase is not state.phase):
        journal.close()
        raise MigrationError(
            f"somebody else has acted on migration {state.name} meanwhile; nothing was touched: see "
            f"nbd-migrate status {state.name}"
        )
    return journal
