"""Who has the guest's disk on B until it is complete: B's QEMU itself, or nbd-overlay at a Unix socket.

    qemu      a QED image that QEMU opens, with copy-on-read, over the export; QEMU streams
    overlay   a raw file and its map, which nbd-overlay serves to QEMU; nbd-overlay streams, and when all is
              there QEMU pivots to the file

Both are told to stream by the same commands, on one monitor or the other.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import ClassVar

from nbdserve.common.errors import ConnectError, MigrationError
from recipes.hosts.quoting import pasted
from recipes.migrate.report import Moment
from recipes.migrate.runtime import READY, Migration
from recipes.plans.plan import Plan
from recipes.qemu.pivot import Pivot, pivot
from recipes.qemu.vm import CommandError, Vm, VmGoneError, connect

LOOK = 0.05
"""Seconds between two looks at what no event announces."""

_END = 10.0
"""Seconds in which a process that has hung up is known to have ended."""


class Engine(ABC):
    """What is different between the two in steps 1, 2, 3, 5 and 6.

    layout              of the image that step 2 makes
    structured_replies  whether the export may offer them
    """

    layout: str
    structured_replies: ClassVar[bool]

    @abstractmethod
    def files(self, plan: Plan) -> list[str]:
        """What the migration makes on B, and what of it a failure before the cut-over has to remove."""

    @abstractmethod
    def nodes(self, plan: Plan) -> list[dict[str, object]]:
        """The guest's disk in B's QEMU, as -blockdev options; the last one is what the -device refers to."""

    @abstractmethod
    def needed_later(self, plan: Plan) -> dict[str, dict[str, object]]:
        """What B's QEMU has to do again or for the first time while the guest is there: as -blockdev options,
        by what it is called."""

    @abstractmethod
    def complete_node(self, plan: Plan) -> dict[str, object]:
        """The guest's disk in B's QEMU once every block of it is local, as a -blockdev option."""

    @abstractmethod
    def streamed(self, plan: Plan) -> str:
        """The device that block-stream is told."""

    @abstractmethod
    async def prepare(self, m: Migration) -> None:
        """Step 3, before B's QEMU is started."""

    @abstractmethod
    async def prepare_again(self, m: Migration) -> None:
        """Before a QEMU is started on B on an incomplete disk whose guest has been here."""

    @abstractmethod
    async def monitor(self, m: Migration) -> Vm:
        """Step 5: the monitor that streaming is told to."""

    @abstractmethod
    async def confirm(self, m: Migration) -> None:
        """Step 5, when the job has ended well: see that the image says so too."""

    @abstractmethod
    async def detach(self, m: Migration) -> None:
        """Step 6: every block is local; part B's QEMU from all that is not its own file."""


class QemuEngine(Engine):
    """B's QEMU does everything."""

    layout = "qed"
    # QEMU (7.2 and 10.0) takes a block status that fails for the end of the disk and stores garbage.
    structured_replies = False

    def files(self, plan: Plan) -> list[str]:
        """The image."""
        return [plan.destination.image]

    def nodes(self, plan: Plan) -> list[dict[str, object]]:
        """Copy-on-read over the overlay over the export.

        The export is a node of its own, not an option of the overlay. So it replaces the backing file that
        the image's header names, with a reconnect-delay, and can be closed when it is not needed any more.
        """
        node, seconds, address = plan.destination.node, plan.limits.reconnect_delay, plan.export.address
        return [
            {
                "node-name": f"{node}-export",
                "driver": "nbd",
                "server": address.qemu_server(),
                "export": address.export,
                "read-only": True,
                "reconnect-delay": seconds,
                "open-timeout": seconds,
            },
            {"node-name": f"{node}-backing", "driver": "raw", "read-only": True, "file": f"{node}-export"},
            {
                "node-name": f"{node}-overlay",
                "driver": "qed",
                "file": {"driver": "file", "filename": plan.destination.image},
                "backing": f"{node}-backing",
            },
            {"node-name": node, "driver": "copy-on-read", "file": f"{node}-overlay"},
        ]

    def needed_later(self, plan: Plan) -> dict[str, dict[str, object]]:
        """Connect to the export again."""
        export = {**self.nodes(plan)[0], "open-timeout": 0}
        del export["node-name"]
        return {f"connect to {plan.export.address} again": export}

    def complete_node(self, plan: Plan) -> dict[str, object]:
        """The image, which has let go of its backing."""
        file = {"driver": "file", "filename": plan.destination.image}
        return {"node-name": plan.destination.node, "driver": "qed", "file": file}

    def streamed(self, plan: Plan) -> str:
        """The overlay's node."""
        return f"{plan.destination.node}-overlay"

    async def prepare(self, m: Migration) -> None:
        """Nothing: QEMU opens the image itself."""

    async def prepare_again(self, m: Migration) -> None:
        """Nothing either."""

    async def monitor(self, m: Migration) -> Vm:
        """QEMU's own."""
        return m.monitor_b

    async def confirm(self, m: Migration) -> None:
        """Nothing: its job's last event comes when the image has let go of its backing."""

    async def detach(self, m: Migration) -> None:
        """Delete the nodes that lead to A, which the overlay has let go of."""
        node, limits = m.plan.destination.node, m.plan.limits
        for name in (f"{node}-backing", f"{node}-export"):
            await m.during(close_node(m.monitor_b, name), limits.command, "closing the export on B")
        m.report.moment(Moment.PIVOTED)


class OverlayEngine(Engine):
    """nbd-overlay has the disk, and B's QEMU is its client."""

    layout = "flat"
    structured_replies = True

    def files(self, plan: Plan) -> list[str]:
        """The raw file and its map, and the sockets, which nbd-overlay leaves behind when it is killed."""
        there = plan.destination
        return [there.image, f"{there.image}.map", there.overlay_socket, there.overlay_monitor]

    def nodes(self, plan: Plan) -> list[dict[str, object]]:
        """The socket of nbd-overlay."""
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
        """The raw file."""
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
            # Who has hung up has ended, or is about to; its keeper tells a moment later.
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
        m.overlay = await m.start(
            "nbd-overlay on B", m.host_b, destination.image, "overlay", argv, ready=True
        )
        await m.during(m.overlay.ready(limits.start), limits.start, "starting nbd-overlay on B")


async def uses_overlay(vm: Vm, node: str) -> bool:
    """Whether the guest's disk is, or was before a pivot, nbd-overlay's; one may have booted on the file."""
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    return all(each["drv"] == "nbd" for each in nodes if each["node-name"] == node)


async def close_node(vm: Vm, node: str) -> None:
    """Delete a block node, if it is there. A job holds its nodes for a moment longer than its last event."""
    while True:
        nodes = await vm.execute("query-named-block-nodes", flat=True)
        if all(each["node-name"] != node for each in nodes):
            return
        try:
            await vm.execute("blockdev-del", node_name=node)
        except CommandError as error:
            if "in use" not in error.reason:
                raise
            await asyncio.sleep(LOOK)


async def reached(name: str, address: str, plan: Plan) -> Vm:
    """Connect to a monitor as soon as it is there; the time limit is the caller's."""
    limits = plan.limits
    while True:
        with suppress(ConnectError):
            return await connect(name, address, limit=limits.connect, command_limit=limits.command)
        await asyncio.sleep(LOOK)


ENGINES: dict[str, Engine] = {"qemu": QemuEngine(), "overlay": OverlayEngine()}


def engine_of(plan: Plan) -> Engine:
    """The engine that the plan names."""
    return ENGINES[plan.destination.engine]


def blockdev_options(nodes: Sequence[Mapping[str, object]]) -> list[str]:
    """Block nodes as words of QEMU's command line."""
    return [word for node in nodes for word in ("-blockdev", json.dumps(node))]
