"""B's QEMU has the disk: a QED image with copy-on-read over the export, which it streams itself."""

from __future__ import annotations

import asyncio

from recipes.engines.interface import LOOK, Engine
from recipes.migrate.progress import Moment
from recipes.migrate.runtime import Migration
from recipes.plans.plan import Plan
from recipes.qemu.vm import CommandError, Vm


class QemuEngine(Engine):
    """B's QEMU does everything."""

    layout = "qed"
    # QEMU (7.2 and 10.0) takes a block status that fails for the end of the disk and stores garbage.
    structured_replies = False

    def files(self, plan: Plan) -> list[str]:
        """Return the image."""
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
        """Return the image, which has let go of its backing."""
        file = {"driver": "file", "filename": plan.destination.image}
        return {"node-name": plan.destination.node, "driver": "qed", "file": file}

    def streamed(self, plan: Plan) -> str:
        """Return the overlay's node."""
        return f"{plan.destination.node}-overlay"

    async def prepare(self, m: Migration) -> None:
        """Nothing: QEMU opens the image itself."""

    async def prepare_again(self, m: Migration) -> None:
        """Nothing either."""

    async def monitor(self, m: Migration) -> Vm:
        """Return QEMU's own."""
        return m.monitor_b

    async def confirm(self, m: Migration) -> None:
        """Nothing: its job's last event comes when the image has let go of its backing."""

    async def detach(self, m: Migration) -> None:
        """Delete the nodes that lead to A, which the overlay has let go of."""
        node, limits = m.plan.destination.node, m.plan.limits
        for name in (f"{node}-backing", f"{node}-export"):
            await m.during(close_node(m.monitor_b, name), limits.command, "closing the export on B")
        m.report.moment(Moment.PIVOTED)


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
