"""The dirty bitmaps of a migration: what a guest changes on its disks while they are copied.

    await begin(vm, nodes, 0)      the first bitmap on each node, all in one instant
    await swap(vm, nodes, 0)       number 1 records from now on, and number 0 is as it is: in one instant, too
    await end(vm, nodes, 1)        number 1 is as it is; nothing records any more
    await remove(vm, nodes, 0)     number 0 is gone; nobody may export it any more
    await remove_all(vm, nodes)    and so are all of ours, whichever there are

A write is marked when it has completed, so what is under way at a swap is in the later bitmap. QEMU exports
no bitmap that records with a read-only export (7.2): one that is to be read is swapped for the next first.
Nothing is persistent: they end with their QEMU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recipes.errors import MigrationError
from recipes.hosts.quoting import listed
from recipes.qemu.vm import Vm

PREFIX = "nbd-migrate-"
"""How the names of ours begin; a number follows."""

GRANULARITY = 64 << 10
"""Bytes for which there is a bit: what nbd-overlay fetches together."""


@dataclass(frozen=True)
class Tracking:
    """The dirty bitmaps of ours that A's QEMU has, or may have.

    nodes    the block nodes that they are on, in the order of the disks
    monitor  the socket of the monitor of A's server, by which they are passed on
    """

    nodes: tuple[str, ...]
    monitor: str


def name_of(number: int) -> str:
    """Return the name of a bitmap."""
    return f"{PREFIX}{number}"


async def begin(vm: Vm, nodes: Sequence[str], number: int) -> None:
    """Have each node record in a new bitmap; on all of them or on none. Raises CommandError."""
    await _together(vm, [_adding(node, number) for node in nodes])


async def swap(vm: Vm, nodes: Sequence[str], number: int) -> None:
    """Have each node record in the next bitmap, and in this one no more. Raises CommandError."""
    steps = [_adding(node, number + 1) for node in nodes]
    await _together(vm, [*steps, *(_disabling(node, number) for node in nodes)])


async def end(vm: Vm, nodes: Sequence[str], number: int) -> None:
    """Have no node record any more. Raises CommandError."""
    await _together(vm, [_disabling(node, number) for node in nodes])


async def remove(vm: Vm, nodes: Sequence[str], number: int) -> None:
    """Remove one from each node. Raises CommandError, as where it is exported."""
    for node in nodes:
        await vm.execute("block-dirty-bitmap-remove", node=node, name=name_of(number))


async def remove_all(vm: Vm, nodes: Sequence[str]) -> None:
    """Remove all of ours from these nodes; there may be none, and no such node. Raises as Vm.execute()."""
    for node, found in (await _bitmaps(vm)).items():
        for each in found:
            if node in nodes and str(each.get("name", "")).startswith(PREFIX):
                await vm.execute("block-dirty-bitmap-remove", node=node, name=each["name"])


async def dirty_bytes(vm: Vm, nodes: Sequence[str], number: int) -> dict[str, int]:
    """Return how many bytes of each node are dirty; MigrationError where one has no such bitmap any more."""
    found = await _bitmaps(vm)
    counts = {
        node: int(each["count"])
        for node in nodes
        for each in found.get(node, [])
        if each.get("name") == name_of(number)
    }
    if lost := [node for node in nodes if node not in counts]:
        raise MigrationError(
            f"A's QEMU records no more what its guest writes to {listed(lost)}: the disk was unplugged, or "
            f"somebody has removed {name_of(number)}; do neither while a disk is copied"
        )
    return counts


async def _bitmaps(vm: Vm) -> dict[str, list[dict[str, Any]]]:
    """Return those of each node, ours and others'."""
    nodes = await vm.execute("query-named-block-nodes", flat=True)
    return {each["node-name"]: each.get("dirty-bitmaps", []) for each in nodes}


def _adding(node: str, number: int) -> dict[str, object]:
    data = {"node": node, "name": name_of(number), "granularity": GRANULARITY, "persistent": False}
    return {"type": "block-dirty-bitmap-add", "data": data}


def _disabling(node: str, number: int) -> dict[str, object]:
    return {"type": "block-dirty-bitmap-disable", "data": {"node": node, "name": name_of(number)}}


async def _together(vm: Vm, actions: Sequence[dict[str, object]]) -> None:
    await vm.call("transaction", {"actions": list(actions)})
