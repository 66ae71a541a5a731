"""What A's QEMU serves by itself, to A's server: disks that nobody else can read while it has them open.

It listens on a Unix socket in a directory that only its user can enter. That there is one is in the journal
(``State.exporter``) before it is made, and every way back takes it away (migrate/leftovers.py).
"""

from __future__ import annotations

from recipes.channel.source_user import source_user
from recipes.hosts.places import place_of
from recipes.migrate.runtime import Migration
from recipes.qemu import exporter


async def listen(m: Migration) -> str:
    """Have A's QEMU listen, unless it does so already for this migration; return the socket's path.

    Raises MigrationError where it has an NBD server of somebody else's, which is left alone.
    """
    if m.state.exporter:
        return socket_of(m)
    limit, image = m.plan.limits.command, m.disks[0].image
    await exporter.require_none(m.a)
    user = await source_user(m)
    directory = await place_of(m.host_a, image, limit) / f"{image.rpartition('/')[2]}.export"
    m.record(exporter=str(directory))
    await exporter.start(m.a, await exporter.place(m.host_a, str(directory), user, limit))
    return socket_of(m)


def socket_of(m: Migration) -> str:
    """Return the socket at which A's QEMU serves, while ``State.exporter`` says that it does."""
    return f"{m.state.exporter}/{exporter.SOCKET}"
