"""The pivot: while the guest writes, its disk moves from the overlay's NBD socket to the local file.

Every block is in that file by then, so the mirror has nothing to copy; but its source and its target are the
same file. In the mirror's usual mode, ``background``, it reads what the guest has written and writes it again
a moment later, over what the guest may have written since: on QEMU 7.2 acknowledged writes are lost.
With ``write-blocking`` QEMU itself writes to both sides before it acknowledges and the job never copies.

It is done when the disk is complete: at the beginning of step 6 (``OverlayEngine.detach``), or by
``nbd-migrate pivot``.

Each step is seen in QEMU's own state, so whoever comes after an orchestrator that died between any two of the
commands goes on where it was:

    blockdev-add       the local file is a node
    blockdev-mirror    a job whose name begins with the node's
    job-complete       the guest's device is on the local node: the guest is independent of the NBD socket
    blockdev-del       the NBD node is closed
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nbdserve.common.clock import now
from recipes.errors import MigrationError
from recipes.hosts.interruption import undisturbed
from recipes.qemu.vm import CommandError, Vm

LOOK = 0.05
"""Seconds between two looks at a state that no event announces."""


@dataclass(frozen=True)
class Pivot:
    """What moves where.

    node   the NBD node that the guest's device uses
    image  the local raw file, an absolute path; complete, and locked by nobody
    limit  seconds that each command, and the wait for each state, may take: with a server that is away, QEMU
           answers only after its reconnect-delay
    """

    node: str
    image: str
    limit: float

    @property
    def local(self) -> str:
        """Return the node of the local file."""
        return f"{self.node}-local"

    @property
    def job(self) -> str:
        """Return the mirror's name, which no pivot of another disk has."""
        return f"{self.node}-mirror"

    @property
    def filter(self) -> str:
        """Return the mirror's node, between the guest's device and the NBD node while the job runs."""
        return f"{self.node}-pivot"

    def blockdev(self) -> dict[str, object]:
        """Return the local node; QEMU takes its image locks, which keep others from writing to the file."""
        file = {"driver": "file", "filename": self.image, "discard": "unmap"}
        return {"driver": "raw", "node-name": self.local, "discard": "unmap", "file": file}


async def pivot(vm: Vm, what: Pivot) -> None:
    """Move the guest's disk to the local file and close the NBD node. May be called again after any failure.

    Raises MigrationError: the guest is where it was, on the NBD node, and nothing is left of the attempt,
    unless the message says otherwise.
    """
    if not await _has_moved(vm, what):
        try:
            await _mirror(vm, what)
        except (MigrationError, asyncio.CancelledError):
            await undisturbed(_withdraw(vm, what))
            raise
        await _switch(vm, what)
    await _leave(vm, what)


async def _mirror(vm: Vm, what: Pivot) -> None:
    """Have QEMU write to both sides, up to the point at which only job-complete is missing."""
    nodes = await _nodes(vm, what)
    if what.local not in nodes:
        await vm.call("blockdev-add", what.blockdev(), limit=what.limit)
        nodes = await _nodes(vm, what)
    if nodes[what.local]["file"] != what.image:
        raise MigrationError(f"{what.local} in B's QEMU is {nodes[what.local]['file']}, not {what.image}")
    remote, local = (int(nodes[name]["image"]["virtual-size"]) for name in (what.node, what.local))
    if remote != local:
        raise MigrationError(
            f"{what.image} has {local} bytes, the guest's disk {remote}; is it the right one?"
        )
    if await _job(vm, what) is None:
        arguments = {
            "job-id": what.job,
            "device": what.node,
            "target": what.local,
            "filter-node-name": what.filter,
            "sync": "none",
            "copy-mode": "write-blocking",
        }
        await vm.call("blockdev-mirror", arguments, limit=what.limit)
    deadline = now() + what.limit
    while (job := await _job(vm, what)) is not None and job["status"] in ("created", "running"):
        if now() > deadline:
            raise MigrationError(f"the job {what.job} was not ready within {what.limit:g} s")
        await asyncio.sleep(LOOK)
    if job is None:
        raise MigrationError(f"the job {what.job} has ended before it was ready")


async def _switch(vm: Vm, what: Pivot) -> None:
    """Complete the job. From here on only the guest's device tells where its disk is."""
    job = await _job(vm, what)
    if job is not None and job["status"] == "ready":
        await vm.call("job-complete", {"id": what.job}, limit=what.limit)
    deadline = now() + what.limit
    while await _job(vm, what) is not None:
        if now() > deadline:
            raise MigrationError(
                f"the job {what.job} did not complete within {what.limit:g} s; run this step again"
            )
        await asyncio.sleep(LOOK)
    if not await _has_moved(vm, what):
        await undisturbed(_withdraw(vm, what))
        raise MigrationError(
            f"the job {what.job} failed, the guest still uses {what.node}; see the log of B's QEMU"
        )


async def _leave(vm: Vm, what: Pivot) -> None:
    """Close the NBD node; a guest that an NBD server's end has stopped goes on with the local file."""
    if what.node in await _nodes(vm, what):
        await _close(vm, what)
    if (await vm.call("query-status", {}, limit=what.limit))["status"] == "io-error":
        await vm.call("cont", {}, limit=what.limit)


async def _close(vm: Vm, what: Pivot) -> None:
    """Delete the NBD node, which the job may hold for a moment longer than it is seen."""
    deadline = now() + what.limit
    while True:
        try:
            await vm.call("blockdev-del", {"node-name": what.node}, limit=what.limit)
            return
        except CommandError as error:
            if "in use" not in error.reason or now() > deadline:
                raise MigrationError(f"the guest's disk is {what.image}, but {error}") from error
        await asyncio.sleep(LOOK)


async def _withdraw(vm: Vm, what: Pivot) -> None:
    """Undo what can be undone while the guest uses the NBD node."""
    # What brought us here says more than a failure here. A job that is ready harms nobody.
    with suppress(MigrationError):
        if await _job(vm, what) is not None:
            # Without force a mirror that is ready would take this for the wish to complete.
            await vm.call("block-job-cancel", {"device": what.job, "force": True}, limit=what.limit)
        deadline = now() + what.limit
        while await _job(vm, what) is not None and now() < deadline:
            await asyncio.sleep(LOOK)
        if what.local in await _nodes(vm, what) and not await _has_moved(vm, what):
            await vm.call("blockdev-del", {"node-name": what.local}, limit=what.limit)


async def _has_moved(vm: Vm, what: Pivot) -> bool:
    """Tell whether the guest's device is on the local node. MigrationError when it is on neither."""
    devices: list[dict[str, Any]] = await vm.call("query-block", {}, limit=what.limit)
    used = {each["inserted"]["node-name"] for each in devices if each.get("inserted")}
    if what.local in used:
        return True
    if used & {what.node, what.filter}:
        return False
    raise MigrationError(f"no device of B's QEMU uses {what.node} or {what.local}; is it the right QEMU?")


async def _nodes(vm: Vm, what: Pivot) -> dict[str, dict[str, Any]]:
    nodes: list[dict[str, Any]] = await vm.call("query-named-block-nodes", {"flat": True}, limit=what.limit)
    return {each["node-name"]: each for each in nodes}


async def _job(vm: Vm, what: Pivot) -> dict[str, Any] | None:
    jobs: list[dict[str, Any]] = await vm.call("query-jobs", {}, limit=what.limit)
    return next((each for each in jobs if each["id"] == what.job), None)
