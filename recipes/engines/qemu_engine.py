"""B's QEMU has the disk: a QED image with copy-on-read over the export, which it streams itself."""

from __future__ import annotations

import asyncio

from recipes.channel.tls import DISK_ID
from recipes.engines.interface import JOB, LOOK, Engine
from recipes.migrate.runtime import Migration
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Plan
from recipes.qemu.vm import CommandError, Vm


class QemuEngine(Engine):
    """B's QEMU does everything."""

    layout = "qed"
    # QEMU (7.2 and 10.0) takes a block status that fails for the end of the disk and stores garbage.
    structured_replies = False
    read_by_qemu = True

    def files(self, disk: PlannedDisk) -> list[str]:
        """Return the image."""
        return [disk.target]

    def nodes(self, plan: Plan, disk: PlannedDisk) -> list[dict[str, object]]:
        """Copy-on-read over the overlay over the export.

        The export is a node of its own, not an option of the overlay. So it replaces the backing file that
        the image's header names, with a reconnect-delay, and can be closed when it is not needed any more.
        """
        node, seconds, address = disk.drive, plan.limits.reconnect_delay, plan.export_of(disk)
        secure = {"tls-creds": DISK_ID} if plan.disk_over_tls else {}
        return [
            {
                "node-name": f"{node}-export",
                "driver": "nbd",
                "server": address.qemu_server(),
                "export": address.export,
                "read-only": True,
                "reconnect-delay": seconds,
                "open-timeout": seconds,
                **secure,
            },
            {"node-name": f"{node}-backing", "driver": "raw", "read-only": True, "file": f"{node}-export"},
            {
                "node-name": f"{node}-overlay",
                "driver": "qed",
                "file": {"driver": "file", "filename": disk.target},
                "backing": f"{node}-backing",
            },
            {"node-name": node, "driver": "copy-on-read", "file": f"{node}-overlay"},
        ]

    def needed_later(self, plan: Plan, disk: PlannedDisk) -> dict[str, dict[str, object]]:
        """Connect to the export again."""
        export = {**self.nodes(plan, disk)[0], "open-timeout": 0}
        del export["node-name"]
        return {f"connect to {plan.export_of(disk)} again": export}

    def complete_node(self, disk: PlannedDisk, size: int) -> dict[str, object]:
        """Return the image, which has let go of its backing."""
        file = {"driver": "file", "filename": disk.target}
        return {"node-name": disk.drive, "driver": "qed", "file": file}

    def streamed(self, plan: Plan, disk: PlannedDisk) -> tuple[str, str]:
        """Return the overlay's node; the jobs of several disks are on one monitor."""
        return JOB if len(plan.disks) == 1 else f"{JOB}-{disk.drive}", f"{disk.drive}-overlay"

    async def prepare(self, m: Migration, disk: PlannedDisk) -> None:
        """Nothing: QEMU opens the image itself."""

    async def prepare_again(self, m: Migration, disk: PlannedDisk) -> None:
        """Nothing either."""

    async def monitor(self, m: Migration, disk: PlannedDisk) -> Vm:
        """Return QEMU's own."""
        return m.monitor_b

    async def confirm(self, m: Migration, disk: PlannedDisk) -> None:
        """Nothing: its job's last event comes when the image has let go of its backing."""

    async def carries(self, m: Migration, disk: PlannedDisk) -> bool:
        """Say no: QEMU has the image itself."""
        return False

    async def detach(self, m: Migration, disk: PlannedDisk) -> None:
        """Delete the nodes that lead to A, which the overlay has let go of."""
        for name in (f"{disk.drive}-backing", f"{disk.drive}-export"):
            closing = close_node(m.monitor_b, name)
            await m.during(closing, m.plan.limits.command, "closing the export on B")

    async def end(self, m: Migration, disk: PlannedDisk) -> None:
        """Nothing was started."""


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
