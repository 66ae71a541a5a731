"""The destination's QEMU around the cut-over: whether it has the guest, as its monitor tells."""

from __future__ import annotations

import asyncio
from enum import Enum

from nbdserve.common.clock import now
from nbdserve.common.errors import ConnectError
from recipes.qemu.vm import Vm, VmGoneError, VmSilentError, connect_again

ARRIVE = 20.0
"""Seconds until the guest must run on B, once everything of it is there."""

LOOK = 0.05
"""Seconds between two looks."""


class Destination(Enum):
    """What B's QEMU says."""

    NONE = "none"
    """There is none at this address."""
    WAITS = "waits"
    """It does not have the guest, or not all of it."""
    HAS_GUEST = "has the guest"
    """Whether that runs, is paused or has been shut down."""
    SILENT = "silent"
    """It does not answer."""


async def has_guest(address: str, limit: float) -> Destination:
    """Ask B's QEMU, again for ARRIVE seconds while it may be about to have the guest.

    ``limit`` is what a connection, and an answer, may take, in seconds.
    """
    deadline = now() + ARRIVE
    while True:
        found = await look(address, limit)
        if found is not Destination.WAITS or now() > deadline:
            return found
        await asyncio.sleep(LOOK)


async def look(address: str, limit: float) -> Destination:
    """Ask B's QEMU once."""
    try:
        b = await connect_again("B's QEMU", address, limit=limit, command_limit=limit)
    except ConnectError:
        return Destination.SILENT
    if b is None:
        return Destination.NONE
    try:
        return await answer_of(b)
    except VmGoneError:
        # Who has hung up may be there for a moment still.
        return Destination.WAITS
    finally:
        await b.disconnect()


async def arrives(b: Vm) -> Destination:
    """Ask a QEMU to which there is a connection, as has_guest() does; raises VmGoneError."""
    deadline = now() + ARRIVE
    while (found := await answer_of(b)) is Destination.WAITS and now() < deadline:
        await asyncio.sleep(LOOK)
    return found


async def answer_of(b: Vm) -> Destination:
    """What B's QEMU says now; raises VmGoneError."""
    try:
        status = (await b.execute("query-status"))["status"]
    except VmSilentError:
        return Destination.SILENT
    return Destination.WAITS if status == "inmigrate" else Destination.HAS_GUEST
