"""What follows from a decision to go back: the guest runs on A again, or everything is left as it is.

Three have to act so, each with its own hands: the command whose step has failed, the guard of one that was
killed, and ``abort``. What they do, and in which order, is here and in decide.py.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass

from nbdserve.common.clock import now
from nbdserve.common.errors import ConnectError
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.migrate.decide import (
    AS_BEFORE,
    BACK,
    MOVING,
    UNKNOWN,
    Action,
    Decision,
    Wish,
    asks_anybody,
    asks_b,
    decide,
    told,
)
from recipes.migrate.leftovers import any_holds_something, but, end_exporter, not_ended
from recipes.migrate.state import Phase, Role, State
from recipes.processes.child import lives
from recipes.qemu.credentials import drop_credentials
from recipes.qemu.destination import ARRIVE
from recipes.qemu.facts import Facts, OnA, OnB
from recipes.qemu.source import (
    UNDER_WAY_ON_A,
    HasLeftError,
    guest_on_a,
    restore_capabilities,
    resume,
    set_downtime_limit,
)
from recipes.qemu.vm import Vm, VmGoneError

ATTEMPTS = 3
"""How often A's QEMU is asked anew when its monitor hangs up in the middle."""

GRACE = 10.0
"""Seconds that a switch-over which is under way is given to come to its end, by who was not there."""

BEFORE_IMAGE = frozenset({Phase.PREPARED, Phase.EXPORT})
"""There is no image of this migration on B yet."""

BRIEF = 2.0
"""Seconds for what is tried first, while the guest may stand still."""

LOOK = 0.05
"""Seconds between two looks."""

NOBODY_ASKED = Facts(OnA.SILENT, OnB.SILENT)
"""What is found where it makes no difference what is found."""


class Hands(ABC):
    """What the three can do; ``said`` is what the operator has to know of it."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.why = ""
        """Why B's QEMU does not say where the guest is."""

    @abstractmethod
    async def source(self) -> Vm | None:
        """Return A's QEMU, None when it has ended; ConnectError when nobody knows."""

    @abstractmethod
    async def destination(self, limit: float | None) -> OnB:
        """Ask whether B's QEMU has the guest, ``limit`` are seconds, or None for as long as it takes."""

    @abstractmethod
    async def end_destination(self) -> None:
        """End B's QEMU; MigrationError when it does not end."""

    @abstractmethod
    async def clear(self) -> list[str]:
        """End the rest and remove what was made; return a phrase for each thing that is left."""

    async def without_b(self, host: Host, state: State) -> OnB:
        """Return what it means that nobody listens at B's monitor: the way there may be lost, and not the
        QEMU.
        """
        known, plan = state.process(Role.QEMU), state.plan
        try:
            if known and await lives(host, known.pid, known.mark, plan.limits.command):
                self.why = "B's QEMU is there, but nobody listens at its monitor"
                return OnB.SILENT
            if state.phase in BEFORE_IMAGE:
                return OnB.NONE
            holds = await any_holds_something(host, state)
        except MigrationError as error:
            self.why = str(error)
            return OnB.SILENT
        return OnB.STOPPED if holds else OnB.NONE

    @property
    def saw_the_end(self) -> bool:
        """Tell whether A's QEMU was seen to end; otherwise nobody listens at its address: the way may be
        lost.
        """
        return False

    def lost(self, words: str, state: State) -> str:
        """Return what is known of the end of A's QEMU; these words, if it has ended."""
        way = "if only the way to its monitor is lost, see to that, and then"
        return f"{words} ({way}: nbd-migrate abort {state.name})"

    @abstractmethod
    def enter(self, phase: Phase, *, cleared: bool = False) -> None:
        """Write down what is done next, and whether nothing is left of what was made; never fails."""


@dataclass(frozen=True)
class Verdict:
    """What was found, what was done, and ``where`` the guest is: one phrase, and what else is to be known."""

    facts: Facts
    decision: Decision
    where: str

    @property
    def action(self) -> Action:
        """Return what was done."""
        return self.decision.action


class WayBack:
    """One attempt to give the guest back to A."""

    def __init__(self, hands: Hands, state: State, *, wish: Wish, grace: float) -> None:
        """A switch-over that is under way has ``grace`` seconds to come to its end."""
        self._hands = hands
        self._state = state
        self._phase = state.phase
        self._wish = wish
        self._grace = grace
        self._switched = self._arrived = 0.0
        self._why = ""

    async def go(self) -> Verdict:
        """Look, decide and act; look again where A's QEMU hangs up meanwhile."""
        hung_up = 0
        self._switched, self._arrived = now() + self._grace, now() + ARRIVE
        if not asks_anybody(self._phase, self._wish):
            decision = decide(self._phase, self._wish, NOBODY_ASKED)
            return Verdict(NOBODY_ASKED, decision, told(decision.words, self._state))
        while True:
            try:
                a = await self._hands.source() if hung_up < ATTEMPTS else None
                facts = await self._look(a, lost=hung_up >= ATTEMPTS)
                decision = decide(self._phase, self._wish, facts)
                if decision.action is not Action.WAIT:
                    return Verdict(facts, decision, await self._act(a, facts, decision))
            except ConnectError as error:
                self._why = str(error)
                facts = await self._with_b(OnA.SILENT)
                decision = decide(self._phase, self._wish, facts)
                return Verdict(facts, decision, await self._act(None, facts, decision))
            except VmGoneError:
                hung_up += 1
            await asyncio.sleep(LOOK)

    async def _look(self, a: Vm | None, *, lost: bool) -> Facts:
        """Find out where the guest is. Raises VmGoneError when A's QEMU hangs up."""
        if lost:
            self._why = "A's QEMU hangs up again and again"
            return await self._with_b(OnA.SILENT)
        if a is None:
            return await self._with_b(OnA.GONE)
        try:
            found = await guest_on_a(a)
        except VmGoneError:
            raise
        except MigrationError as error:
            self._why = str(error)
            found = OnA.SILENT
        if found is OnA.SWITCHES and now() > self._switched:
            found = OnA.STUCK
        return await self._with_b(found)

    async def _with_b(self, found: OnA) -> Facts:
        if not asks_b(self._phase, self._wish, found):
            return Facts(found, OnB.SILENT)
        on_b = await self._hands.destination(BRIEF if found is OnA.STUCK else None)
        if on_b is OnB.WAITS and now() > self._arrived:
            on_b = OnB.LATE
        if on_b is OnB.SILENT and not self._why:
            silent = "A's QEMU has ended, and B's does not answer" if found is OnA.GONE else ""
            self._why = self._hands.why or silent
        return Facts(found, on_b)

    async def _act(self, a: Vm | None, facts: Facts, decision: Decision) -> str:
        """Do what was decided; return where the guest is."""
        match decision.action:
            case Action.CLEAN_UP:
                return await self._clean_up(a, facts, decision)
            case Action.TAKE_BACK | Action.END_B_FIRST | Action.START_OVER:
                return await self._take_back(a, facts, decision)
            case _:
                words = told(decision.words, self._state)
                if words == UNKNOWN:
                    return f"{words}: {self._why}" if self._why else words
                # Other words may end in a command.
                return f"{self._why}; {words}" if self._why else words

    async def _clean_up(self, a: Vm | None, facts: Facts, decision: Decision) -> str:
        words = self._hands.lost(decision.words, self._state) if facts.a is OnA.GONE else decision.words
        if facts.a is OnA.SILENT:
            later = f"it may stand still; when that is mended: nbd-migrate abort {self._state.name}"
            words = f"{words}: {self._why}; {later}"
        if a is not None and words == AS_BEFORE:
            await self._restore(a)
        left = await self._end_exporter(a, facts)
        left += await self._hands.clear()
        if facts.a is OnA.SILENT or (facts.a is OnA.GONE and not self._hands.saw_the_end):
            # It may be there, and stand still: then there is more to do, once it can be reached.
            self._hands.enter(self._phase, cleared=not left)
        else:
            over = Phase.LOST if facts.a is OnA.GONE else Phase.TAKEN_BACK
            self._hands.enter(over, cleared=not left)
        return but(words, *self._hands.said, *left)

    async def _take_back(self, a: Vm | None, facts: Facts, decision: Decision) -> str:
        """Bring the guest back to A, in the order that keeps it from running twice."""
        if a is not None:
            b_first = decision.action is Action.END_B_FIRST or (
                decision.action is Action.START_OVER
                and (self._phase in MOVING | BACK or facts.a is OnA.STUCK)
            )
            if b_first:
                self._hands.enter(Phase.TAKING_BACK)
                self._phase = Phase.TAKING_BACK
                await self._end_destination(facts)
            else:
                await self._let_go_on(a)
                await self._end_destination(facts)
            # What is complete after B's end was the migration to B; before, it is one to who lives.
            stands = await resume(a, ours=b_first and facts.a in UNDER_WAY_ON_A)
            if stands:
                self._hands.said.append(stands)
            await self._restore(a)
        left = await self._end_exporter(a, facts)
        left += await self._hands.clear()
        self._hands.enter(Phase.TAKEN_BACK, cleared=not left)
        return but(AS_BEFORE, *self._hands.said, *left)

    async def _let_go_on(self, a: Vm) -> None:
        """Let the guest run at once, whatever has become of B's host. A QEMU there that hangs, and reads
        nothing, may keep A's from coming to an end: then that goes on when B's has ended."""
        try:
            await resume(a, limit=BRIEF)
        except (VmGoneError, HasLeftError):
            raise
        except MigrationError:
            return

    async def _end_destination(self, facts: Facts) -> None:
        """End B's QEMU; where it could have the guest, one that does not end is reason enough to stop."""
        try:
            await self._hands.end_destination()
        except MigrationError as error:
            if self._phase is Phase.TAKING_BACK and facts.a is not OnA.RUNS:
                raise
            self._hands.said.append(str(error))

    async def _end_exporter(self, a: Vm | None, facts: Facts) -> list[str]:
        """Have A's QEMU serve its disks no more; return a phrase where that is left to be done."""
        if a is None:
            return not_ended(self._state, self._why) if facts.a is OnA.SILENT else []
        said, left = await end_exporter(a, self._state)
        self._hands.said += said
        return left

    async def _restore(self, a: Vm) -> None:
        try:
            await restore_capabilities(a, self._state.capabilities)
            if self._state.certificates and self._state.plan.ram_over_tls:
                await drop_credentials(a, self._state.parameters)
            if self._state.downtime_limit:
                await set_downtime_limit(a, self._state.downtime_limit)
        except VmGoneError:
            raise
        except MigrationError as error:
            what = "the migration capabilities and parameters of A's QEMU"
            self._hands.said.append(f"{what} are not as they were: {error}")
