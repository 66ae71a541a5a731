"""The destination's QEMU around the cut-over: whether it has the guest, as its monitor tells."""

from __future__ import annotations

from nbdserve.common.errors import ConnectError
from recipes.connections.monitors import MonitorAt
from recipes.qemu.facts import OnB
from recipes.qemu.vm import Vm, VmGoneError, VmSilentError, connect_again

ARRIVE = 20.0
"""Seconds until the guest must run on B, once everything of it is there."""


async def look(where: MonitorAt | str, limit: float) -> OnB:
    """Ask B's QEMU once."""
    try:
        b = await connect_again("B's QEMU", where, limit=limit, command_limit=limit)
    except ConnectError:
        return OnB.SILENT
    if b is None:
        return OnB.NONE
    try:
        return await answer_of(b)
    except VmGoneError:
        # Who has hung up may be there for a moment still.
        return OnB.WAITS
    finally:
        await b.disconnect()


async def answer_of(b: Vm, limit: float | None = None) -> OnB:
    """Ask a QEMU to which there is a connection, for ``limit`` seconds; raises VmGoneError."""
    try:
        status = (await b.execute("query-status", limit=limit))["status"]
    except VmSilentError:
        return OnB.SILENT
    return OnB.WAITS if status == "inmigrate" else OnB.HAS_GUEST
