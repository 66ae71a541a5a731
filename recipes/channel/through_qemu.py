"""What A's QEMU serves by itself, to A's server: disks that nobody else can read while it has them open.

It listens on a Unix socket in a directory that only its user can enter. That there is one is in the journal
(``State.exporter``) before it is made, and every way back takes it away (migrate/leftovers.py).
"""

from __future__ import annotations

from nbdserve.common.uri import NbdUri
from recipes.channel.source_user import source_user
from recipes.checks.disk_nodes import disk_nodes
from recipes.hosts.places import NBD_SERVER, beside
from recipes.migrate.leftovers import end_exporter, remove_exporter
from recipes.migrate.runtime import Migration
from recipes.plans.disks import PlannedDisk
from recipes.qemu import exporter
from recipes.qemu.exporter import NodeExport
from recipes.qemu.images import RAW


async def listen(m: Migration) -> str:
    """Have A's QEMU listen, unless it does so already for this migration; return the socket's path.

    Raises MigrationError where it has an NBD server of somebody else's, which is left alone.
    """
    if m.state.exporter:
        return socket_of(m)
    limit, image = m.plan.limits.command, m.disks[0].image
    await exporter.require_none(m.a)
    user = await source_user(m)
    directory = await beside(m.host_a, image, NBD_SERVER, limit)
    m.record(exporter=directory)
    await exporter.start(m.a, await exporter.place(m.host_a, directory, user, limit))
    return socket_of(m)


async def serve(m: Migration) -> None:
    """Have A's QEMU serve each disk that it alone can read; raises as listen() does."""
    await listen(m)
    for disk, node in zip(m.disks, await disk_nodes(m.plan, m.a), strict=True):
        if disk.format != RAW:
            await exporter.remove(m.a, disk.drive)
            await exporter.add(m.a, NodeExport(disk.drive, node.name))


async def end(m: Migration) -> None:
    """A's QEMU is to serve nothing more. Raises VmGoneError."""
    said, left = await end_exporter(m.a, m.state)
    for each in (*said, *left):
        m.report.note(each)


async def forget(m: Migration) -> None:
    """A's QEMU serves nothing more: remove what is left of that."""
    if m.state.exporter or m.state.tracking:
        for left in await remove_exporter(m.host_a, m.state, m.plan.limits.command):
            m.report.note(left)
        m.record(exporter="", tracking=None)


def uri_of(m: Migration, disk: PlannedDisk) -> NbdUri:
    """Return where it serves a disk to A's server."""
    return NodeExport(disk.drive, "").uri(socket_of(m))


def socket_of(m: Migration) -> str:
    """Return the socket at which A's QEMU serves, while ``State.exporter`` says that it does."""
    return f"{m.state.exporter}/{exporter.SOCKET}"
