"""The rounds of copying before the cut-over: everything first, then what the guest has changed meanwhile.

Each round copies what the guest has changed during the one before. When the guest goes is decided by
convergence.py, or asked for (running/cutover_wish.py). What it has changed since the last round began is left
for the window: blocks that it changes all the time are not sent again and again for nothing. While its RAM
moves there are rounds still, as that may take long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from nbdserve.common.clock import now
from nbdserve.common.sizes import format_size
from recipes.errors import MigrationError
from recipes.migrate.progress import PrecopyProgress
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase, Prediction, Round
from recipes.plans.policy import MANUAL
from recipes.precopy.convergence import Look, Verdict, judge
from recipes.precopy.copier import Copier
from recipes.precopy.tracker import Tracker
from recipes.running import cutover_wish

LOOK = 0.2
"""Seconds between two looks at the copying."""

ASK = 1.0
"""Seconds between two questions to A's QEMU, which has a guest to run."""

REST = 5.0
"""Seconds from one round to the next where there is no hurry: the guest is waited for, or its RAM moves."""

MOST = 20
"""Rounds that are kept, the last ones."""

_COPYING = "the copying of the disk before the cut-over"


class Rounds:
    """Those of one migration.

    tracker  what the guest changes
    """

    def __init__(self, m: Migration, tracker: Tracker) -> None:
        self._m = m
        self.tracker = tracker
        self._copier = Copier(m)
        self._number = 0
        self._size: int | None = None
        """Bytes of the round that goes on; None: everything, and it is not known yet how much that is."""
        self._begin = now()
        self._is_noted = False
        """It is over, and kept."""
        self._owed = 0
        """Bytes that were forgotten since the copying was looked at last."""
        self._dirty = 0
        self._asked = 0.0
        """When A's QEMU was asked last how much is dirty."""
        self._stopping = asyncio.Event()
        self._failure: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._aside: asyncio.Task[None] | None = None
        self._kept: tuple[Round, ...] = ()

    @property
    def copied(self) -> int:
        """Return how many bytes were copied in all of them."""
        return self._copier.moved

    async def run(self) -> Verdict:
        """Copy in rounds until the guest is to go; return why. Raises MigrationError."""
        self._begin = now()
        await self._copier.start()
        # For who lets the guest go before the first round is over.
        await self._copier.settle()
        waits = False
        while True:
            if await self._copy():
                return Verdict.ASKED
            look = await self._end_round()
            verdict = judge(self._m.plan.cutover, look)
            if verdict is not Verdict.AGAIN:
                return verdict
            if not look.halves or self._m.plan.cutover.kind == MANUAL:
                waits = waits or self._tell_of_waiting(look)
                if await self._wait(REST):
                    return Verdict.ASKED
            await self._begin_round()

    def go_on_aside(self) -> None:
        """Go on with rounds beside what is done now, until finish()."""
        self._m.need(_COPYING, self._failure)
        self._aside = asyncio.create_task(self._go_on())

    async def finish(self) -> dict[str, Any]:
        """The guest stands still: have forgotten on B what it has changed; return what the journal is told.

        Raises MigrationError: then the guest must not go to B.
        """
        self._stopping.set()
        if self._aside:
            await self._aside
        self._m.refuse_the_dead()
        self._m.no_longer_need(_COPYING)
        count = await self.tracker.finish()
        missing = self._copier.missing + self._owed + count
        window = self._copier.expected.window(missing)
        prediction = None if window is None else Prediction(missing, window, self.tracker.added)
        return {"prediction": prediction, "rounds": self._kept, "precopied": self.copied}

    async def close(self) -> None:
        """End what goes on aside, and leave the monitors to others."""
        self._stopping.set()
        if self._aside:
            self._aside.cancel()
            # What it has failed with is told already, or of no account any more.
            await asyncio.gather(self._aside, return_exceptions=True)
        self._m.no_longer_need(_COPYING)
        await self.tracker.close()

    async def _go_on(self) -> None:
        rested = now()
        try:
            while not self._stopping.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK):
                        await self._stopping.wait()
                        return
                if not await self._looked_in_time():
                    return
                # No sync: the guest, if it stood still meanwhile, would have to wait for that.
                if self._copier.is_done and now() - rested > REST:
                    if not self._is_noted:
                        self._note_round()
                    await self._begin_round()
                    rested = now()
        except MigrationError as error:
            self._failure.set_result(f"has failed: {error}")

    async def _looked_in_time(self) -> bool:
        """Look how far the copying is; False where the guest stands still meanwhile, and waits for us."""
        looking = asyncio.ensure_future(self._look(tell=False))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({looking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if looking.done():
                looking.result()
            return not self._stopping.is_set()
        finally:
            looking.cancel()
            stopping.cancel()

    async def _copy(self) -> bool:
        """Wait until everything of the round is there; tell whether the cut-over was asked for instead."""
        while True:
            await self._look()
            if cutover_wish.was_asked(self._m):
                return True
            if self._copier.is_done:
                return False
            await self._copier.rest(LOOK)

    async def _look(self, *, tell: bool = True) -> None:
        told = await self._copier.look()
        self._owed = 0
        if not tell:
            return
        if now() - self._asked > ASK:
            self._asked = now()
            self._dirty = await self.tracker.dirty()
        window = self._copier.expected.window(told.missing + self._dirty)
        progress = PrecopyProgress(self._number, told.done, told.total, told.rate, self._dirty, window)
        self._m.report.precopy(progress)
        self._m.journal.note_progress(precopy=progress)

    async def _end_round(self) -> Look:
        """Everything of the round is there: see how that went, and have it on stable storage."""
        size = self._note_round()
        await self._copier.settle()
        self._dirty = await self.tracker.dirty()
        expected = self._copier.expected
        return Look(size, self._dirty, expected.rest(self._dirty), expected.window(self._dirty))

    def _note_round(self) -> int:
        """Keep how a round went that is over; return its bytes."""
        size = self._copier.moved if self._size is None else self._size
        seconds = now() - self._begin
        self._copier.measured(size, seconds)
        self._kept = (*self._kept, Round(self._number, size, seconds))[-MOST:]
        self._is_noted = True
        return size

    async def _begin_round(self) -> None:
        self._size = await self.tracker.advance()
        self._owed = self._size
        self._number += 1
        self._begin, self._is_noted = now(), False

    async def _wait(self, seconds: float) -> bool:
        """Wait; tell whether the cut-over was asked for meanwhile."""
        until = self._begin + seconds
        while now() < until:
            await self._look()
            if cutover_wish.was_asked(self._m):
                return True
            await self._copier.rest(LOOK)
        return cutover_wish.was_asked(self._m)

    def summary(self, verdict: Verdict) -> str:
        """Return one line about the rounds, and why the guest goes now."""
        rounds = f"{self._number + 1} rounds" if self._number else "one round"
        done = f"{format_size(self.copied)} were copied in {rounds} before the cut-over"
        left = f"{format_size(self._dirty)} were changed since the last one began"
        match verdict:
            case Verdict.DIVERGES:
                return (
                    f"{done}; {left}, more than half of it: this does not converge, and the guest goes; the "
                    "rest of its disk follows"
                )
            case Verdict.ASKED:
                return f"{done}; {left}; the cut-over was asked for"
            case _:
                return f"{done}; {left}: the guest goes"

    def _tell_of_waiting(self, look: Look) -> bool:
        """Say once what is waited for; return True."""
        how = f"to let it go now: nbd-migrate cutover {self._m.state.name}"
        if self._m.plan.cutover.kind == MANUAL:
            self._m.report.note(f"the disk is copied, and the guest stays until it is told to go: {how}")
        else:
            changed = (
                f"the guest changes {format_size(look.dirty)} during a round of {format_size(look.copied)}"
            )
            self._m.report.note(f"{changed}, and stays until that is less; {how}")
        return True


@asynccontextmanager
async def copied_before(m: Migration) -> AsyncIterator[Rounds | None]:
    """With policy hybrid: copy the disks before the cut-over, and go on with that while the block runs."""
    if not m.plan.hybrid:
        yield None
        return
    m.enter(Phase.PRECOPY)
    tracker = await Tracker.begin(m)
    rounds = Rounds(m, tracker)
    try:
        verdict = await rounds.run()
        m.report.note(rounds.summary(verdict))
        rounds.go_on_aside()
        yield rounds
    finally:
        await rounds.close()
