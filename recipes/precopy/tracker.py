"""What the guest changes on A while its disks are copied, and that this is forgotten on B, in time.

Why no block that is out of date can be served on B. Of each block that nbd-overlay keeps:

1. It was asked for after the first bitmaps had begun to record. What was read before, as by B's QEMU when it
   started, is forgotten as soon as they do (:meth:`Tracker.begin`).
2. A write of A's guest is marked when it completes. A read of A's server sees each write that had completed
   before it (also one past the page cache: a file's pages are dropped as that completes, and where they are
   not it is read past the page cache, too: nbdserve/backends/opening.py); so what a block lacks is marked
   after it was asked for, in the bitmap that records at that time.
3. There is no time between two bitmaps: the next begins in the transaction that ends the one before.
4. Each bitmap that has ended is read and its blocks are forgotten, in every overlay, or stays in the list of
   those for which that is to be done. nbd-overlay stores nothing that it had asked for before it was told to
   forget (``asked_at`` in overlay/formats/image.py), so what is marked is read again, after it was marked.
5. At ``pre-switchover`` the guest stands still and QEMU has completed its writes. Then the last bitmap ends,
   and all that are in the list are forgotten, durably, before A's QEMU is told to continue
   (:meth:`Tracker.finish`, steps/cutover.py). Where that fails, or takes too long, or anything dies, nobody
   is told to continue: the migration is cancelled, and the guest goes on on A.
6. So B's guest begins on overlays in which no block is out of date, and from then on nothing writes to A's
   disks. Only now nbd-overlay is told that the guest is here (``overlay-activate``, step 5), or sees its
   first write, whichever is first: both mean that nothing is invalidated any more.

A bitmap is exported by A's QEMU on its Unix socket, under a name that only one that has ended ever had, and
read there by A's server, each time over a connection of its own: what is told is what it has come to. It goes
to nbd-overlay over the two monitors, for which B needs no connection to be made while the guest stands still.
"""

from __future__ import annotations

from collections.abc import Sequence

from nbdserve.common.clock import now
from recipes.channel import through_qemu
from recipes.channel.source_server import NAME, monitor_path
from recipes.checks.disk_nodes import disk_nodes
from recipes.connections.monitors import monitor_of
from recipes.engines.interface import reached
from recipes.engines.overlay_engine import monitor_of_overlay
from recipes.errors import MigrationError
from recipes.hosts.interruption import together
from recipes.migrate.runtime import Migration
from recipes.plans.disks import PlannedDisk
from recipes.qemu import bitmaps, exporter
from recipes.qemu.bitmaps import Tracking
from recipes.qemu.exporter import NodeExport
from recipes.qemu.vm import CommandError, Vm


class Tracker:
    """The bitmaps of a migration, made by begin(). Not to be cancelled in the middle, unless all is given up.

    added  seconds for which the guest stood still for the last one
    """

    def __init__(self, m: Migration, nodes: Sequence[str], server: Vm) -> None:
        self._m = m
        self._nodes = tuple(nodes)
        self._server = server
        self._number = 0
        """Of the bitmap that records."""
        self._ended: list[int] = []
        """Bitmaps that do not record any more, and that not every overlay is known to have forgotten."""
        self._exported: list[str] = []
        """Exports of them that are there, or may be."""
        self.added = 0.0

    @classmethod
    async def begin(cls, m: Migration) -> Tracker:
        """Record from now on what the guest changes, and forget what was read before.

        Raises MigrationError, as where A's QEMU has an NBD server of somebody else's.
        """
        limit = m.plan.limits.command
        found = await m.during(disk_nodes(m.plan, m.a), limit, "looking at A's disks")
        nodes = tuple(each.name for each in found)
        monitor = await monitor_path(m)
        m.record(tracking=Tracking(nodes, monitor))
        await m.during(through_qemu.listen(m), limit * 2, "having A's QEMU serve its dirty bitmaps")
        server = await m.during(
            reached(NAME, monitor_of(m.host_a, monitor), m.plan), limit, f"reaching {NAME}"
        )
        tracker = cls(m, nodes, server)
        try:
            await tracker._begin()
        except BaseException:
            await tracker.close()
            raise
        return tracker

    async def _begin(self) -> None:
        m, limit = self._m, self._m.plan.limits.command
        try:
            await m.during(bitmaps.begin(m.a, self._nodes, 0), limit, "recording what the guest changes")
        except CommandError as error:
            raise MigrationError(f"A's QEMU cannot record what its guest changes: {error.reason}") from error
        for disk in m.disks:
            overlay, size = await monitor_of_overlay(m, disk), m.state.disk(disk).size
            forgetting = overlay.execute("overlay-invalidate", offset=0, length=size)
            await m.during(forgetting, limit, "forgetting what was read before")
        # The whole way once before it is needed: who refuses does so now, and who loads anything has done so.
        await self.advance()

    async def dirty(self) -> int:
        """Return how many bytes the guest has changed since the bitmap that records began."""
        found = bitmaps.dirty_bytes(self._m.a, self._nodes, self._number)
        return sum(
            (await self._m.during(found, self._m.plan.limits.command, "looking at A's bitmaps")).values()
        )

    async def advance(self) -> int:
        """Begin the next bitmap, and have forgotten what those before it say; return that many bytes.

        Raises MigrationError; then it may be tried again.
        """
        limit = self._m.plan.limits.command
        await self._m.during(
            bitmaps.swap(self._m.a, self._nodes, self._number), limit, "swapping A's bitmaps"
        )
        self._ended.append(self._number)
        self._number += 1
        return await self._m.during(self._forget_ended(), limit * 2, "reading A's bitmaps")

    async def finish(self) -> int:
        """Have forgotten all that is left, while the guest stands still; return that many bytes.

        Raises MigrationError: then the guest must not go to B.
        """
        begin, limit = now(), self._m.plan.limits.command

        count = await self._m.during(self._read(last=True), limit, "reading the last of A's bitmaps")
        self.added = now() - begin
        return count

    async def _forget_ended(self) -> int:
        count = await self._read()
        await self._withdraw()
        for number in list(self._ended):
            await bitmaps.remove(self._m.a, self._nodes, number)
            self._ended.remove(number)
        return count

    async def _read(self, *, last: bool = False) -> int:
        """Have each overlay forget what the bitmaps that have ended say of its disk, all at once.

        With ``last`` the one that records ends before that.
        """
        if self._exported:
            await self._withdraw()
        numbers = [*self._ended, *([self._number] if last else [])]
        names = tuple(bitmaps.name_of(number) for number in numbers)
        exports = [
            NodeExport(f"bitmap-{disk.drive}-{numbers[-1]}", node, names)
            for disk, node in zip(self._m.disks, self._nodes, strict=True)
        ]
        self._exported = [each.name for each in exports]
        # Told at once, and done one after the other; of a bitmap that records there would be no export.
        ending = [bitmaps.end(self._m.a, self._nodes, self._number)] if last else []
        await together([*ending, *(exporter.add(self._m.a, each) for each in exports)])
        self._ended = numbers
        work = zip(self._m.disks, exports, strict=True)
        return sum(await together([self._read_for(disk, exported) for disk, exported in work]))

    async def _read_for(self, disk: PlannedDisk, exported: NodeExport) -> int:
        upstream = str(exported.uri(through_qemu.socket_of(self._m)))
        return sum([await self._forget(disk, upstream, name) for name in exported.bitmaps])

    async def _forget(self, disk: PlannedDisk, upstream: str, bitmap: str) -> int:
        """Have what a bitmap says forgotten, in as many parts as A's server tells it in."""
        overlay, size = self._m.overlay_monitors[disk.drive], self._m.state.disk(disk).size
        count, place = 0, 0
        while place is not None:
            told = await self._server.execute(
                "x-query-dirty-bitmap", filename=upstream, bitmap=bitmap, offset=place
            )
            if told["size"] != size:
                raise MigrationError(f"{bitmap} is of a disk of {told['size']} bytes, not {size}")
            forgotten = await overlay.execute("overlay-invalidate", ranges=told["ranges"])
            count, place = count + int(forgotten["bytes"]), told["next"]
        return count

    async def _withdraw(self) -> None:
        """See that no bitmap is exported; none may be."""
        for name in self._exported:
            await exporter.remove(self._m.a, name)
        self._exported = []

    async def leave(self) -> None:
        """The guest is on B, and A's QEMU has ended: its bitmaps are gone."""
        await self.close()
        if not self._m.a.connected:
            await through_qemu.forget(self._m)

    async def close(self) -> None:
        """Leave the monitor of A's server to others."""
        await self._server.disconnect()
