"""The pivot: while the guest writes, its disk moves from the overlay's NBD socket to the local file.

The guest's device is on a raw node, and that on the NBD node. Every block is in the file by then, and
``blockdev-reopen`` of the raw node puts the file in the socket's place: QEMU lets the requests that are under
way end, flushes, and every later one goes to the file. There is no job, nothing is copied, and no instant
in which both are written to or neither. A server that has died has to be there again, as it is flushed.

A mirror from the socket to the file was tried before. With QEMU 7.2 it ends in an assertion when the guest's
disk is an IDE one (``child->perm & BLK_PERM_WRITE``), it has to be in the mode ``write-blocking`` lest
acknowledged writes be lost, and leaves the guest on another node.

It is done when the disk is complete: at the beginning of step 6 (``OverlayEngine.detach``), or by
``nbd-migrate pivot``.

Each step is seen in QEMU's own state, so whoever comes after an orchestrator that died between any two of the
commands goes on where it was:

    blockdev-add       the local file is a node
    blockdev-reopen    the guest's node is on it: the guest is independent of the NBD socket
    blockdev-del       the NBD node is closed
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from nbdserve.common.clock import now
from recipes.errors import MigrationError
from recipes.hosts.interruption import undisturbed
from recipes.qemu.images import file_of
from recipes.qemu.vm import CommandError, Vm

_NOT_FLUSHED = "Error flushing drive"
"""What QEMU says when the node below cannot be flushed, as it is before another is put in its place."""

LOOK = 0.05
"""Seconds between two looks at a state that no event announces."""


class ServerAwayError(MigrationError):
    """Nobody serves the NBD node. Once somebody does, the pivot may be tried again."""


@dataclass(frozen=True)
class Pivot:
    """What moves where.

    node   the raw node that the guest's device uses, on an NBD node
    image  the local raw file, or block device, an absolute path; complete, and locked by nobody
    limit  seconds that each command may take: with a server that is away, QEMU answers only after its
           reconnect-delay
    on_device  whether the image is a block device, which may be larger than the disk
    opening    how QEMU opens the image, if it can: its cache and aio
    guests     what the guest's node has besides, which is said again
    """

    node: str
    image: str
    limit: float
    on_device: bool = False
    opening: Mapping[str, object] = field(default_factory=dict)
    guests: Mapping[str, object] = field(default_factory=dict)

    @property
    def socket(self) -> str:
        """Return the NBD node below."""
        return socket_of(self.node)

    @property
    def local(self) -> str:
        """Return the node of the local file."""
        return f"{self.node}-local"

    def blockdev(self) -> dict[str, object]:
        """Return the local node; QEMU takes its image locks, which keep others from writing to the file."""
        driver = "host_device" if self.on_device else "file"
        return {"driver": driver, "node-name": self.local, "filename": self.image, "discard": "unmap"}

    def reopened(self, size: int | None = None) -> dict[str, object]:
        """Return the guest's node on the local one; with ``size``, on so many bytes of it."""
        only = {} if size is None else {"size": size}
        node = {"driver": "raw", "node-name": self.node, "discard": "unmap", "file": self.local}
        return {**node, **self.guests, **only}

    def is_on(self, file: str) -> bool:
        """Tell whether a raw node of which QEMU tells this file is on the image."""
        return file_of(file) == self.image


def socket_of(node: str) -> str:
    """Return the NBD node below the raw node of this name."""
    return f"{node}-socket"


async def pivot(vm: Vm, what: Pivot) -> None:
    """Move the guest's disk to the local file and close the NBD node. May be called again after any failure.

    Raises MigrationError: the guest is where it was, on the NBD node, and nothing is left of the attempt,
    unless the message says otherwise.
    """
    nodes = await _nodes(vm, what)
    if what.node not in nodes and what.socket in nodes:
        # The disk was unplugged, and its node removed: nobody needs the socket any more.
        await _leave(vm, what)
        return
    await _check(vm, what, nodes)
    if not what.is_on(nodes[what.node]["file"]):
        try:
            await _move(vm, what, nodes)
        except (MigrationError, asyncio.CancelledError):
            await undisturbed(_withdraw(vm, what))
            raise
    await _leave(vm, what)


async def _check(vm: Vm, what: Pivot, nodes: dict[str, dict[str, Any]]) -> None:
    """Insist that the guest's disk is what this can move."""
    devices: list[dict[str, Any]] = await vm.call("query-block", {}, limit=what.limit)
    used = {each["inserted"]["node-name"] for each in devices if each.get("inserted")}
    # A disk that was unplugged moves as well: it may be plugged in again, and its socket is to be closed.
    if what.node not in used and not {what.node, what.socket} <= nodes.keys():
        raise MigrationError(f"no device of B's QEMU uses {what.node}; is it the right QEMU?")
    driver = nodes[what.node]["drv"]
    if driver != "raw":
        raise MigrationError(
            f"{what.node} in B's QEMU is {driver}, and only a raw node can move to a file; start it with "
            f"-blockdev driver=raw,node-name={what.node},file=NODE"
        )


async def _move(vm: Vm, what: Pivot, nodes: dict[str, dict[str, Any]]) -> None:
    """Put the file in the socket's place."""
    if what.local not in nodes:
        await _open(vm, what)
        nodes = await _nodes(vm, what)
    if nodes[what.local]["file"] != what.image:
        raise MigrationError(f"{what.local} in B's QEMU is {nodes[what.local]['file']}, not {what.image}")
    remote, local = (int(nodes[name]["image"]["virtual-size"]) for name in (what.node, what.local))
    if local < remote or (local > remote and not what.on_device):
        raise MigrationError(
            f"{what.image} has {local} bytes, the guest's disk {remote}; is it the right one?"
        )
    reopened = what.reopened(None if local == remote else remote)
    try:
        await vm.call("blockdev-reopen", {"options": [reopened]}, limit=what.limit)
    except CommandError as error:
        if _NOT_FLUSHED in error.reason:
            raise ServerAwayError(f"{error}: its server is away; serve {what.image} there again") from error
        raise


async def _open(vm: Vm, what: Pivot) -> None:
    """Let QEMU open the image; as it does by default where it cannot do so as it is told."""
    try:
        await vm.call("blockdev-add", {**what.blockdev(), **what.opening}, limit=what.limit)
    except CommandError:
        if not what.opening:
            raise
        await vm.call("blockdev-add", what.blockdev(), limit=what.limit)


async def _leave(vm: Vm, what: Pivot) -> None:
    """Close the NBD node; a guest that an NBD server's end has stopped goes on with the local file."""
    if what.socket in await _nodes(vm, what):
        try:
            await vm.call("blockdev-del", {"node-name": what.socket}, limit=what.limit)
        except CommandError as error:
            raise MigrationError(f"the guest's disk is {what.image}, but {error}") from error
    if (await vm.call("query-status", {}, limit=what.limit))["status"] == "io-error":
        await vm.call("cont", {}, limit=what.limit)


async def _withdraw(vm: Vm, what: Pivot) -> None:
    """Undo what can be undone while the guest uses the NBD node."""
    # What brought us here says more than a failure here.
    with suppress(MigrationError):
        deadline = now() + what.limit
        while now() < deadline:
            nodes = await _nodes(vm, what)
            if what.local not in nodes or what.node not in nodes or what.is_on(nodes[what.node]["file"]):
                return
            with suppress(CommandError):
                await vm.call("blockdev-del", {"node-name": what.local}, limit=what.limit)
                return
            await asyncio.sleep(LOOK)


async def has_moved(vm: Vm, node: str) -> bool:
    """Tell whether the guest's raw node is on a file, and no NBD node is left below it."""
    nodes: list[dict[str, Any]] = await vm.execute("query-named-block-nodes", flat=True)
    return all(each["node-name"] != socket_of(node) for each in nodes)


async def _nodes(vm: Vm, what: Pivot) -> dict[str, dict[str, Any]]:
    nodes: list[dict[str, Any]] = await vm.call("query-named-block-nodes", {"flat": True}, limit=what.limit)
    return {each["node-name"]: each for each in nodes}
