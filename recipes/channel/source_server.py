"""The monitor of A's server, by which exports come and go while others are used."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from recipes.connections.monitors import monitor_of
from recipes.migrate.runtime import Migration
from recipes.qemu.vm import Vm, connect

NAME = "nbdserve on A"


async def monitor_path(m: Migration) -> str:
    """Return the socket of the monitor."""
    return f"{await m.place(m.host_a, m.disks[0].image, 'nbdserve')}.qmp"


@asynccontextmanager
async def monitor(m: Migration) -> AsyncIterator[Vm]:
    """Give a connection to the monitor, which is there. Raises ConnectError."""
    where, limits = monitor_of(m.host_a, await monitor_path(m)), m.plan.limits
    server = await connect(NAME, where, limit=limits.connect, command_limit=limits.command)
    try:
        yield server
    finally:
        await server.disconnect()
