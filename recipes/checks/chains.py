"""Whether the files of a disk are what A's QEMU has open: after the cut-over they are read without it.

That QEMU may have been given other images below the active one than its file names, or none.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from pathlib import PurePosixPath

from recipes.checks.disk_nodes import DiskNode
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Plan
from recipes.qemu.images import QCOW2, RAW, Layer, chain_of, file_of, listed_chain, snapshots_in

TOOLS = ("qemu-img", "qemu-nbd")
"""What A needs for a disk that is no raw one; Debian has both in qemu-utils."""

IDENTITIES = (
    'for p; do if test -b "$p"; then stat -L -c "device %t:%T" -- "$p"; '
    'elif test -e "$p"; then stat -L -c "inode %d:%i" -- "$p"; else readlink -m -- "$p"; fi; done'
)
"""Says of each path, on a line, what no other file has."""


async def check_chains(plan: Plan, nodes: Sequence[DiskNode], host_a: Host) -> None:
    """Raise MigrationError where the files of a disk are not what A's QEMU has open, or cannot be read."""
    for disk, node in zip(plan.disks, nodes, strict=True):
        if disk.format != RAW:
            opened = [in_place(layer, node, disk) for layer in chain_of(node.info)]
            await check_chain(plan, disk, opened, host_a)


def in_place(layer: Layer, node: DiskNode, disk: PlannedDisk) -> Layer:
    """Return a layer with an absolute name, where the disk's image shows what QEMU's is relative to."""
    top = posixpath.normpath(file_of(node.info["filename"]))
    directory = disk.image.removesuffix(top) if disk.image.endswith(f"/{top}") else ""
    return Layer(posixpath.join(directory, layer.file), layer.format)


async def check_chain(plan: Plan, disk: PlannedDisk, opened: Sequence[Layer], host_a: Host) -> None:
    """Raise it for one disk."""
    limit, key = plan.limits.command, plan.called("image")
    for tool in await host_a.lacking(TOOLS, limit):
        remedy = f"there is no {tool} on {host_a.name}: install qemu-utils there"
        raise MigrationError(f"{key}: {disk.image} is {disk.format}, and {remedy}")
    try:
        told = await host_a.run(*looking("info", disk, "--backing-chain"), limit=limit)
    except MigrationError as error:
        why = f"{disk.image} cannot be read on A without its QEMU: {error}"
        raise MigrationError(f"{key}: {why}") from error
    files = listed_chain(json.loads(told))
    if not await are_same(opened, files, host_a, limit):
        raise MigrationError(
            f"{key}: A's QEMU has {described(opened)}, and the files themselves say {described(files)}: "
            "after the cut-over they are read without it; start the guest on what they say (qemu-img rebase "
            "-u changes that)"
        )


def left_on_a(plan: Plan, nodes: Sequence[DiskNode]) -> list[str]:
    """Return what does not move with the disks, a sentence each: snapshots inside of an image."""
    told = []
    for disk, node in zip(plan.disks, nodes, strict=True):
        if names := snapshots_in(node.info):
            told.append(f"the snapshots in {disk.image} ({', '.join(names)}) stay in that image, on A")
    return told


async def are_same(here: Sequence[Layer], there: Sequence[Layer], host: Host, limit: float) -> bool:
    """Tell whether two chains are of the same files, by whatever names, in the same formats."""
    if [each.format for each in here] != [each.format for each in there]:
        return False
    names = [each.file for each in (*here, *there)]
    if not all(PurePosixPath(name).is_absolute() for name in names):
        return False
    found = (await host.run("sh", "-c", IDENTITIES, "sh", *names, limit=limit)).splitlines()
    return found[: len(here)] == found[len(here) :]


def described(chain: Sequence[Layer]) -> str:
    """Return a chain in words."""
    return " over ".join(f"{each.file} ({each.format})" for each in chain)


async def held(plan: Plan, disk: PlannedDisk, host_a: Host) -> int:
    """Return how many bytes a disk holds that is no raw one, with what is below it."""
    # All its tables are read, which takes as long as A's disk does.
    answer = await host_a.told(*looking("measure", disk, "-O", QCOW2), limit=plan.limits.stall)
    return int(answer["required"])


def looking(command: str, disk: PlannedDisk, *options: str) -> list[str]:
    """Return how an image is looked at that another process has open for writing."""
    return [
        "qemu-img",
        command,
        "--force-share",
        "--output=json",
        "-f",
        disk.format,
        *options,
        "--",
        disk.image,
    ]
