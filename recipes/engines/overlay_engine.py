"""nbd-overlay has the disk: a raw file and its map, served to B's QEMU, which uses the file in the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress

from nbdserve.common.clock import now
from nbdserve.common.sizes import format_size
from recipes.channel.tls import disk_uri
from recipes.connections.monitors import monitor_of
from recipes.engines.interface import JOB, Engine, reached
from recipes.errors import MigrationError
from recipes.migrate.runtime import READY, Migration
from recipes.migrate.state import Role
from recipes.plans.by_hand import on_host
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Plan
from recipes.processes.children import Child
from recipes.qemu.pivot import Pivot, ServerAwayError, has_moved, pivot, socket_of
from recipes.qemu.vm import Vm, VmGoneError

_AGAIN = 1.0
"""Seconds between two attempts to pivot from a server that was away."""

_END = 10.0
"""Seconds in which a process that has hung up is known to have ended."""


class OverlayEngine(Engine):
    """nbd-overlay has the disk, a process for each, and B's QEMU is its client."""

    layout = "flat"
    structured_replies = True

    def files(self, disk: PlannedDisk) -> list[str]:
        """Return the raw file and its map, and the sockets, which nbd-overlay leaves behind when it is
        killed.
        """
        return list(disk.beside)

    def nodes(self, plan: Plan, disk: PlannedDisk) -> list[dict[str, object]]:
        """Return the socket of nbd-overlay, and the raw node that is on the file in the end."""
        seconds, socket = plan.limits.reconnect_delay, socket_of(disk.drive)
        return [
            {
                "node-name": socket,
                "driver": "nbd",
                "server": {"type": "unix", "path": disk.overlay_socket},
                "reconnect-delay": seconds,
                "open-timeout": seconds,
                "discard": "unmap",
            },
            {"node-name": disk.drive, "driver": "raw", "discard": "unmap", "file": socket, **disk.guests},
        ]

    def needed_later(self, plan: Plan, disk: PlannedDisk) -> dict[str, dict[str, object]]:
        """Connect to nbd-overlay again when that was started again, and open the file in the end."""
        return {
            f"connect to {disk.overlay_socket} again": {
                "driver": "nbd",
                "server": {"type": "unix", "path": disk.overlay_socket},
                "read-only": True,
            },
            # Without locks, as nbd-overlay holds them until it is complete.
            f"open {disk.target} in the end": {**disk.file_node(), **disk.opening, "locking": "off"},
        }

    def complete_node(self, disk: PlannedDisk, size: int) -> dict[str, object]:
        """Return the raw file, or the part of the device that is the disk."""
        file = {**disk.file_node(), "discard": "unmap"}
        only = {"size": size} if disk.on_device else {}
        node = {"node-name": disk.drive, "driver": "raw", "discard": "unmap", "file": file}
        return {**node, **disk.guests, **only}

    def streamed(self, plan: Plan, disk: PlannedDisk) -> tuple[str, str]:
        """nbd-overlay has only one disk, and one job."""
        return JOB, disk.drive

    async def prepare(self, m: Migration, disk: PlannedDisk) -> None:
        """Start nbd-overlay, which keeps nothing until the guest has come, or until it is told to copy."""
        overlay = await self._start(m, disk, "--pre-copy" if m.plan.hybrid else "--armed")
        m.need(overlay.name, overlay.wait())

    async def prepare_again(self, m: Migration, disk: PlannedDisk) -> None:
        """See that nbd-overlay serves the disk."""
        await self.monitor(m, disk)

    async def monitor(self, m: Migration, disk: PlannedDisk) -> Vm:
        """nbd-overlay's, which is told that the guest is here, and is started again if it has died or dies
        meanwhile, as often as limits.restarts says.
        """
        for _ in range(m.plan.limits.restarts):
            with suppress(VmGoneError):
                return await self._monitor(m, disk)
        return await self._monitor(m, disk)

    async def _monitor(self, m: Migration, disk: PlannedDisk) -> Vm:
        monitor = m.overlay_monitors.get(disk.drive)
        was_there = monitor is not None or m.overlay(disk) is not None
        if monitor and not monitor.connected:
            await m.overlay_monitors.pop(disk.drive).disconnect()
            monitor = None
            # Who has hung up has ended, or is about to; its supervisor tells a moment later.
            with suppress(TimeoutError):
                async with asyncio.timeout(_END):
                    if overlay := m.overlay(disk):
                        await overlay.wait()
        if monitor is None:
            overlay = m.overlay(disk)
            if overlay is None or not overlay.running:
                if was_there:
                    m.record(recoveries=m.state.recoveries + 1)
                    m.report.note(
                        f"{monitor_name(m, disk)} has ended; it is started again, and the guest waits"
                    )
                await self._start(m, disk)
            monitor = await monitor_of_overlay(m, disk)
        await monitor.execute("overlay-activate")
        told = await monitor.execute("query-overlay")
        if (told.get("verify") is not None) != m.plan.verifies and not told["complete"]:
            # Somebody has thought better of it since it was started.
            await monitor.execute("overlay-verify", enable=m.plan.verifies)
        where = str(disk_uri(m, disk))
        if not told["complete"] and [source["uri"] for source in told["sources"]] != [where]:
            # A came back under another address than the image was made with.
            await monitor.execute("overlay-backing", backing=[where])
        return monitor

    async def confirm(self, m: Migration, disk: PlannedDisk) -> None:
        """The map must be gone: what is left is the raw disk."""
        if await m.host_b.test("-e", disk.map, m.plan.limits.command):
            raise MigrationError(f"{disk.target} is not a plain raw disk yet: there is {disk.map}")

    async def account(self, m: Migration, disk: PlannedDisk) -> float:
        """Write down what did not have to be sent, and what was compared; return how long that took."""
        if not (disk.seed or m.plan.verifies):
            return 0.0
        told = await m.overlay_monitors[disk.drive].execute("query-overlay")
        verify = told.get("verify") or {"over": False, "compared": 0, "written": 0}
        equal, written = verify["compared"], verify["written"]
        m.record(disks=m.state.with_facts(disk, seeded=told["seeded"], verified=equal, written=written))
        if told["seed-trouble"]:
            m.report.note(f"the seed {disk.seed} was not of the use that it could be: {told['seed-trouble']}")
        if verify["over"]:
            m.report.note(
                f"{disk.target} is verified: {format_size(equal)} are as on A, {format_size(written)} have "
                "been written by the guest on B"
            )
        elif m.plan.verifies:
            m.report.note(
                f"{disk.target} was complete before this nbd-overlay began: whether it is verified stands in "
                "the log of the one before"
            )
        return float(verify.get("seconds", 0.0))

    async def carries(self, m: Migration, disk: PlannedDisk) -> bool:
        """Tell whether B's QEMU has not pivoted yet."""
        return m.b is not None and not await has_moved(m.b, disk.drive)

    async def detach(self, m: Migration, disk: PlannedDisk) -> None:
        """Let QEMU pivot to the file."""
        destination, limits = m.plan.destination, m.plan.limits
        patience = limits.command + limits.reconnect_delay
        what = Pivot(disk.drive, disk.target, patience, disk.on_device, disk.opening, disk.guests)
        deadline = now() + limits.recover
        try:
            # A guest may have booted on the file.
            while not await has_moved(m.monitor_b, disk.drive):
                try:
                    await pivot(m.monitor_b, what)
                except ServerAwayError:
                    if now() > deadline:
                        raise
                    await self._serve_again(m, disk)
        except VmGoneError:
            raise
        except MigrationError as error:
            if not m.has_guest:
                raise
            again = ["nbd-migrate", "pivot", "--qmp", destination.qmp, "--node", disk.drive, disk.target]
            raise MigrationError(
                f"{error}; until B's QEMU uses the file itself leave nbd-overlay running; try "
                f"{on_host(destination, again)}"
            ) from error

    async def _serve_again(self, m: Migration, disk: PlannedDisk) -> None:
        """See that nbd-overlay serves the disk; QEMU may take a while to connect to it again."""
        with suppress(MigrationError):
            await self.monitor(m, disk)
        await asyncio.sleep(_AGAIN)

    async def end(self, m: Migration, disk: PlannedDisk) -> None:
        """End nbd-overlay, which nobody uses any more; CommandError when somebody does."""
        limits, overlay = m.plan.limits, m.overlay(disk)
        monitor = m.overlay_monitors.get(disk.drive)
        if monitor:
            with suppress(VmGoneError):
                await monitor.execute("quit")
        if overlay:
            await overlay.stop(limits.stop)
        elif monitor:
            await m.during(monitor.gone(), limits.stop, f"the end of {m.called(Role.OVERLAY, disk.drive)}")
        if overlay is None or overlay.status != 0:
            # One that was killed leaves its sockets.
            sockets = (disk.overlay_socket, disk.overlay_monitor)
            await m.host_b.run("rm", "-f", "--", *sockets, limit=limits.command)

    async def _start(self, m: Migration, disk: PlannedDisk, *options: str) -> Child:
        destination, limits = m.plan.destination, m.plan.limits
        argv = [
            *(m.host_b.tool("nbd-overlay"), "serve", "--layout", self.layout, disk.target),
            *("-k", disk.overlay_socket, "--qmp", f"unix:{disk.overlay_monitor}"),
            *self._on_device(m, disk),
            # What QEMU 7.2 does with a failed block status, see QemuEngine, it does here too.
            *("--copy-on-read", "on", "--simple-replies", "--pid-file", READY),
            *("--connections", str(limits.connections)),
            *destination.ownership("--socket-"),
            *("--reconnect-timeout", f"{limits.reconnect_timeout:g}", *options),
            *await self._seed(m, disk),
            *(["--verify"] if m.plan.verifies else []),
        ]
        overlay = await m.start(Role.OVERLAY, argv, ready=True, drive=disk.drive)
        await m.during(overlay.ready(limits.start), limits.start, f"starting {overlay.name}")
        return overlay

    def _on_device(self, m: Migration, disk: PlannedDisk) -> list[str]:
        """Return the words for a block device, which may be larger than the disk that is on it."""
        return ["--map", disk.map, "--size", str(m.state.disk(disk).size)] if disk.on_device else []

    async def _seed(self, m: Migration, disk: PlannedDisk) -> list[str]:
        """Return the words for a copy that B has; one that has gone since must not stop the guest."""
        if not disk.seed:
            return []
        if m.arrived and not await m.host_b.test("-r", disk.seed, m.plan.limits.command):
            m.report.note(f"the seed {disk.seed} on B is there no more; what is missing is copied")
            return []
        return ["--seed", disk.seed]


async def monitor_of_overlay(m: Migration, disk: PlannedDisk) -> Vm:
    """Return the monitor of the nbd-overlay that runs for a disk. VmGoneError where it ends before."""
    name = monitor_name(m, disk)
    if disk.drive not in m.overlay_monitors:
        reaching = reached(name, monitor_of(m.host_b, disk.overlay_monitor), m.plan)
        m.overlay_monitors[disk.drive] = await m.during(
            while_it_lives(name, reaching, m.overlay(disk)),
            m.plan.limits.start,
            f"reaching {name}'s monitor",
        )
    return m.overlay_monitors[disk.drive]


async def while_it_lives(name: str, work: Awaitable[Vm], child: Child | None) -> Vm:
    """Wait for ``work``; VmGoneError where the process ends before: nobody listens there any more."""
    if child is None:
        return await work
    waits = asyncio.ensure_future(work), asyncio.ensure_future(child.wait())
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if waits[0].done():
            return waits[0].result()
        raise VmGoneError(f"{name} {waits[1].result()}")
    finally:
        for each in waits:
            each.cancel()


def monitor_name(m: Migration, disk: PlannedDisk) -> str:
    """Return what messages call nbd-overlay's monitor."""
    return f"nbd-overlay{m.about(disk)}"
