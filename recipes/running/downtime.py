"""How long the guest may stand still while the last of its RAM is sent: as short as the guest lets us.

QEMU stops a guest as soon as what is missing of its RAM can be sent within ``downtime-limit``, 300 ms unless
somebody has set it. On a link that the RAM fills it takes about as long then, also where the guest changes so
little that another pass would have left next to nothing. So it begins with a short limit. A guest that
changes its RAM too fast for that is given twice as long with every look at which QEMU has begun anew, up to
what was set: some passes more, and then all is as it would have been.

Not where QEMU emulates the guest: TCG (7.2) misses some of what a guest writes between the passes, mostly the
kernel's timers, and the kernel panics on B. With 300 ms most of a small guest is sent while it stands still.
"""

from __future__ import annotations

from recipes.migrate.runtime import Migration
from recipes.qemu.source import downtime_limit, runs_on_kvm, set_downtime_limit
from recipes.qemu.vm import Vm

SHORTEST = 10
"""Milliseconds that the guest may stand still at first."""

TELLING = 2
"""Passes that say nothing of the guest: one sends all of its RAM, one what was changed meanwhile."""


class Downtime:
    """A's limit while it sends its guest, in milliseconds, ``longest`` at most."""

    def __init__(self, a: Vm, longest: int) -> None:
        self._a = a
        self._longest = longest
        self._limit = min(SHORTEST, longest)
        self._passes = TELLING

    async def begin(self) -> None:
        """Have it short at first. Raises as Vm.execute() does."""
        await set_downtime_limit(self._a, self._limit)

    async def follow(self, passes: int) -> None:
        """Give the guest longer, if QEMU has begun another pass since the last look and still not stopped it.

        Raises as Vm.execute() does.
        """
        if self._limit < self._longest and passes > self._passes:
            self._limit = min(2 * self._limit, self._longest)
            await set_downtime_limit(self._a, self._limit)
        self._passes = max(passes, self._passes)


async def short_downtime(m: Migration) -> Downtime | None:
    """Have the guest stand still for a short time at first; None where it is emulated.

    The journal has what was set. Raises as Vm.execute() does.
    """
    if not await runs_on_kvm(m.a):
        return None
    longest = await downtime_limit(m.a)
    m.record(downtime_limit=longest)
    downtime = Downtime(m.a, longest)
    await downtime.begin()
    return downtime
