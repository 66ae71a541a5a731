"""How long a window takes in any case, rehearsed: work of the same kinds, none of which changes anything."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Awaitable
from enum import Enum

from nbdserve.common.clock import now
from recipes.channel.source_user import source_user
from recipes.engines.overlay_engine import monitor_of_overlay
from recipes.hosts.stable_storage import sync
from recipes.migrate.runtime import Migration

STARTS = 2
"""Small programs that start on A, one after the other: the fence, and its supervisor."""

REMOVALS = 2
"""Commands on A that remove what its QEMU has left."""

QUESTIONS = 8
"""Questions to each disk's monitor, and to those of the QEMUs, one after the other."""

TRIED = 4
"""How often a rehearsal starts a program: each start takes now less, now more."""

_KEPT = 3 * TRIED
"""Durations of a kind that count, the last ones."""


class Work(Enum):
    """A kind of work, which takes about as long each time."""

    START = "a small program on A"
    COMMAND = "a command on A"
    QUESTION = "a question to a monitor"
    LOOK = "a look at a file on B"
    SYNC = "writing to stable storage"


class Rehearsal:
    """What was measured in one migration. Of each kind the median counts."""

    def __init__(self, m: Migration) -> None:
        self._m = m
        self._took: defaultdict[Work, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))

    @property
    def beside(self) -> float:
        """Return seconds in which A is parted with, while the disks follow."""
        # Where A's QEMU serves the disks a server takes its place, with a supervisor.
        starts = STARTS * 2 if self._m.plan.through_qemu else STARTS
        return starts * self._of(Work.START) + REMOVALS * self._of(Work.COMMAND)

    @property
    def after(self) -> float:
        """Return seconds that it takes behind that to see that all disks are whole, and stay so."""
        questions = QUESTIONS * len(self._m.disks) * self._of(Work.QUESTION)
        return questions + len(self._m.disks) * self._of(Work.LOOK) + self._of(Work.SYNC)

    async def run(self) -> None:
        """Do some of each kind. Raises MigrationError, as when what is needed ends meanwhile."""
        m, limits = self._m, self._m.plan.limits
        for _ in range(TRIED):
            looking = m.during(source_user(m), limits.command, "looking at A")
            await self._note(Work.START, looking)
        for disk in m.disks:
            there = m.host_a.test("-e", disk.image, limits.command)
            await self._note(Work.COMMAND, m.during(there, limits.command, "looking at A"))
            monitor = await monitor_of_overlay(m, disk)
            for _ in range(QUESTIONS):
                asking = m.during(monitor.execute("query-overlay"), limits.command, "asking nbd-overlay")
                await self._note(Work.QUESTION, asking)
            here = m.host_b.test("-e", disk.map, limits.command)
            await self._note(Work.LOOK, m.during(here, limits.command, "looking at B"))
        syncing = sync(m.host_b, [disk.target for disk in m.disks], limits.stall)
        await self._note(Work.SYNC, m.during(syncing, math.inf, "writing to stable storage"))

    async def _note(self, kind: Work, work: Awaitable[object]) -> None:
        begin = now()
        await work
        self._took[kind].append(now() - begin)

    def _of(self, kind: Work) -> float:
        took = self._took[kind]
        return statistics.median(took) if took else 0.0
