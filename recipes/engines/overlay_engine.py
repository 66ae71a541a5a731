"""nbd-overlay has the disk: a raw file and its map, served to B's QEMU, which uses the file in the end."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from recipes.engines.interface import Engine, reached
from recipes.errors import MigrationError
from recipes.hosts.quoting import pasted
from recipes.migrate.progress import Moment
from recipes.migrate.runtime import READY, Migration
from recipes.migrate.state import Role
from recipes.plans.plan import Plan
from recipes.qemu.pivot import Pivot, pivot
from recipes.qemu.vm import Vm, VmGoneError

_END = 10.0
"""Seconds in which a process that has hung up is known to have ended."""


class OverlayEngine(Engine):
    """nbd-overlay has the disk, and B's QEMU is its client."""

    layout = "flat"
    structured_replies = True

    def files(self, plan: Plan) -> list[str]:
        """Return the raw file and its map, and the sockets, which nbd-overlay leaves behind when it is
        killed.
        """
        there = plan.destination
        return [there.image, f"{there.image}.map", there.overlay_socket, there.overlay_monitor]

    def nodes(self, plan: Plan) -> list[dict[str, object]]:
        """Return the socket of nbd-overlay."""
        destination, seconds = plan.destination, plan.limits.reconnect_delay
        return [
            {
                "node-name": destination.node,
                "driver": "nbd",
                "server": {"type": "unix", "path": destination.overlay_socket},
                "reconnect-delay": seconds,
                "open-timeout": seconds,
                "discard": "unmap",
            }
        ]

    def needed_later(self, plan: Plan) -> dict[str, dict[str, object]]:
        """Connect to nbd-overlay again when that was started again, and open the file in the end."""
        there = plan.destination
        return {
            f"connect to {there.overlay_socket} again": {
                "driver": "nbd",
                "server": {"type": "unix", "path": there.overlay_socket},
                "read-only": True,
            },
            # Without locks, as nbd-overlay holds them until it is complete.
            f"open {there.image} in the end": {"driver": "file", "filename": there.image, "locking": "off"},
        }

    def complete_node(self, plan: Plan) -> dict[str, object]:
        """Return the raw file."""
        file = {"driver": "file", "filename": plan.destination.image, "discard": "unmap"}
        return {"node-name": plan.destination.node, "driver": "raw", "discard": "unmap", "file": file}

    def streamed(self, plan: Plan) -> str:
        """nbd-overlay has only one disk."""
        return plan.destination.node

    async def prepare(self, m: Migration) -> None:
        """Start nbd-overlay, which keeps nothing until the guest has come."""
        await self._start(m, "--armed")
        assert m.overlay
        m.need("nbd-overlay on B", m.overlay.wait())

    async def prepare_again(self, m: Migration) -> None:
        """See that nbd-overlay serves the disk."""
        await self.monitor(m)

    async def monitor(self, m: Migration) -> Vm:
        """nbd-overlay's, which is told that the guest is here, and is started again if it has died."""
        if m.overlay_monitor and not m.overlay_monitor.connected:
            await m.overlay_monitor.disconnect()
            m.overlay_monitor = None
            # Who has hung up has ended, or is about to; its supervisor tells a moment later.
            with suppress(TimeoutError):
                async with asyncio.timeout(_END):
                    if m.overlay:
                        await m.overlay.wait()
        if m.overlay_monitor is None:
            if m.overlay is None or not m.overlay.running:
                await self._start(m)
            m.overlay_monitor = await m.during(
                reached("nbd-overlay", m.plan.destination.overlay_monitor, m.plan),
                m.plan.limits.start,
                "reaching nbd-overlay's monitor",
            )
        await m.overlay_monitor.execute("overlay-activate")
        return m.overlay_monitor

    async def confirm(self, m: Migration) -> None:
        """The map must be gone: what is left is the raw disk."""
        image = m.plan.destination.image
        if await m.host_b.test("-e", f"{image}.map", m.plan.limits.command):
            raise MigrationError(f"{image} is not a plain raw disk yet: there is {image}.map")

    async def detach(self, m: Migration) -> None:
        """Let QEMU pivot to the file, then end nbd-overlay."""
        destination, limits = m.plan.destination, m.plan.limits
        what = Pivot(destination.node, destination.image, limits.command + limits.reconnect_delay)
        try:
            if await uses_overlay(m.monitor_b, destination.node):
                await pivot(m.monitor_b, what)
        except VmGoneError:
            raise
        except MigrationError as error:
            if not m.has_guest:
                raise
            again = ["nbd-migrate", "pivot", "--qmp", destination.qmp, "--node", destination.node]
            raise MigrationError(
                f"{error}; until B's QEMU uses the file itself leave nbd-overlay running; try "
                f"{pasted([*again, destination.image])}"
            ) from error
        m.report.moment(Moment.PIVOTED)
        await self.end_overlay(m)

    async def end_overlay(self, m: Migration) -> None:
        """End nbd-overlay, which nobody uses any more; CommandError when somebody does."""
        destination, limits = m.plan.destination, m.plan.limits
        if m.overlay_monitor:
            with suppress(VmGoneError):
                await m.overlay_monitor.execute("quit")
        if m.overlay:
            await m.overlay.stop(limits.stop)
        elif m.overlay_monitor:
            await m.during(m.overlay_monitor.gone(), limits.stop, "the end of nbd-overlay on B")
        if m.overlay is None or m.overlay.status != 0:
            # One that was killed leaves its sockets.
            sockets = (destination.overlay_socket, destination.overlay_monitor)
            await m.host_b.run("rm", "-f", "--", *sockets, limit=limits.command)

    async def _start(self, m: Migration, *options: str) -> None:
        destination, limits = m.plan.destination, m.plan.limits
        argv = [
            *(m.host_b.tool("nbd-overlay"), "serve", "--layout", self.layout, destination.image),
            *("-k", destination.overlay_socket, "--qmp", f"unix:{destination.overlay_monitor}"),
            # What QEMU 7.2 does with a failed block status, see QemuEngine, it does here too.
            *("--copy-on-read", "on", "--simple-replies", "--pid-file", READY),
            *("--connections", str(limits.connections)),
            *destination.ownership("--socket-"),
            *("--reconnect-timeout", f"{limits.reconnect_timeout:g}", *options),
        ]
        overlay = await m.start(Role.OVERLAY, argv, ready=True)
        await m.during(overlay.ready(limits.start), limits.start, "starting nbd-overlay on B")


async def uses_overlay(vm: Vm, node: str) -> bool:
    """Tell whether the guest's disk is, or was before a pivot, nbd-overlay's.

    One may have booted on the file.
    """
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    return all(each["drv"] == "nbd" for each in nodes if each["node-name"] == node)
