"""Which block node of A's QEMU is a disk of the plan, and whether it can be moved as the plan says."""

from __future__ import annotations

import asyncio
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbdserve.common.errors import UsageError
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Plan
from recipes.qemu.images import FORMATS, fault_in, file_of
from recipes.qemu.vm import CommandError, Vm

_PROTOCOLS = ("file", "host_device")
"""Drivers of nodes that know nothing of formats, and have the same file."""


_TRIED = "nbd-migrate-tried"
"""A node that A's QEMU has for a moment."""


@dataclass(frozen=True)
class DiskNode:
    """A disk of the plan in A's QEMU.

    name  its block node's
    size  in bytes
    info  what QEMU tells of its image, and of what is below that
    """

    name: str
    size: int
    info: Mapping[str, Any]


async def disk_nodes(plan: Plan, a: Vm) -> list[DiskNode]:
    """Return the node of each disk of the plan; UsageError where A's QEMU has another one, or none."""
    # Both at once: the guest may stand still meanwhile.
    blocks, nodes = await asyncio.gather(a.execute("query-block"), a.execute("query-named-block-nodes"))
    devices = {each["device"]: each.get("inserted", {}) for each in blocks}
    return [disk_node(plan, disk, devices, nodes) for disk in plan.disks]


def disk_node(
    plan: Plan, disk: PlannedDisk, devices: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]
) -> DiskNode:
    """Find one of them in what A's QEMU has."""
    wanted, node = disk.image, disk.node
    # The devices of -blockdev have no name.
    name = devices.get(node, {}).get("node-name", node) if node else ""
    if name and all(each["node-name"] != name for each in nodes):
        raise UsageError(f"{plan.called('node')}: A's QEMU has no block node or device {node!r}")
    # The file's own node is named too; only the format's tells what is in the file.
    found = [each for each in nodes if may_be(each["file"], wanted) and each["drv"] not in _PROTOCOLS]
    if name:
        found = [each for each in found if each["node-name"] == name]
    if not found:
        raise UsageError(unknown_image(plan, disk, nodes))
    for fault in faults(disk, found[0]):
        raise UsageError(f"{plan.called('image')}: {fault}")
    return DiskNode(found[0]["node-name"], int(found[0]["image"]["virtual-size"]), found[0]["image"])


def may_be(name: str, image: str) -> bool:
    """Tell whether a file that QEMU names so may be this image.

    It may be relative to a directory that the monitor does not tell: check_open() looks whether it is.
    """
    name = posixpath.normpath(file_of(name))
    if name.startswith("/"):
        return name == posixpath.normpath(image)
    name = name.removeprefix("../" * name.count("../"))
    return posixpath.normpath(image).endswith(f"/{name}")


async def check_given_up(plan: Plan, nodes: Sequence[DiskNode], a: Vm) -> list[str]:
    """Raise MigrationError for an image that A's QEMU cannot open again, and so would keep its guest.

    One that ``-drive`` has made it opens for reading only to give it up, which a QEMU that was started by
    root and has become another user may not be able to. Measured on 7.2: ``bdrv_inactivate_all() failed
    (-1)``, and the migration has failed. Of one of a ``-blockdev`` it depends on that (auto-read-only);
    returns what is to be told of these.
    """
    devices = [each for each in await a.execute("query-block") if each["device"] and each.get("inserted")]
    by_drive = {each["inserted"]["node-name"] for each in devices}
    told: list[dict[str, Any]] = await a.execute("query-named-block-nodes")
    drivers = {each["file"]: each["drv"] for each in told if each["drv"] in _PROTOCOLS}
    warnings = []
    for disk, node in zip(plan.disks, nodes, strict=True):
        file = file_of(node.info["filename"])
        if file not in drivers:
            continue
        opening = {"driver": drivers[file], "filename": file, "read-only": True, "locking": "off"}
        try:
            await a.call("blockdev-add", {**opening, "node-name": _TRIED})
        except CommandError as error:
            fault = f"A's QEMU cannot open {disk.image} any more ({error.reason}), as who it runs as now"
            remedy = "let that user read it (chgrp, setfacl)"
            if node.name in by_drive:
                raise MigrationError(
                    f"{plan.called('image')}: {fault}, and would keep its guest: to give a disk up it opens "
                    f"it for reading; {remedy}, and run again"
                ) from error
            warnings.append(f"{fault}: if its -blockdev says auto-read-only it will keep its guest; {remedy}")
            continue
        await a.execute("blockdev-del", node_name=_TRIED)
    return warnings


async def check_recorded(nodes: Sequence[DiskNode], a: Vm) -> None:
    """Raise UsageError for a disk of which a dirty bitmap would not have all that its guest writes.

    Such a device sends the guest's commands to the host's, and QEMU does not know which of them write.
    """
    names = {node.name for node in nodes}
    for each in await a.execute("query-block"):
        if "qdev" in each and each.get("inserted", {}).get("node-name") in names:
            kind = await a.execute("qom-get", path=each["qdev"], property="type")
            if kind in _PAST_QEMU:
                raise UsageError(
                    f"destination.policy: the disk of {each['qdev']} is in a {kind}, and what its guest "
                    "writes goes past A's QEMU, which cannot record it: use postcopy"
                )


_PAST_QEMU = ("scsi-block", "scsi-generic")


async def check_open(plan: Plan, nodes: Sequence[DiskNode], host_a: Host) -> None:
    """Raise UsageError for an image that may be what A's QEMU names, and that its process has not open."""
    unsure = [
        disk
        for disk, node in zip(plan.disks, nodes, strict=True)
        if file_of(node.info["filename"]) != disk.image
    ]
    if not unsure:
        return
    limit = plan.limits.command
    process = await host_a.told(*host_a.own("process", plan.source.qmp), limit=limit)
    for disk in unsure:
        image = (await host_a.run("readlink", "-m", "--", disk.image, limit=limit)).removesuffix("\n")
        if image not in process["files"]:
            raise UsageError(
                f"{plan.called('image')}: A's QEMU, process {process['pid']}, has not {disk.image} open, but "
                "another file of that name; name that"
            )


def faults(disk: PlannedDisk, node: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a disk cannot be moved as the plan says."""
    image, has = disk.image, node["drv"]
    if has not in FORMATS:
        yield f"{image} is {has}; only {' and '.join(FORMATS)} images can be moved"
    if has != disk.format:
        yield f'{image} is {has}: say so in its [[disk]], format = "{has}"'
    if node["ro"]:
        yield f"{image} is read-only in A's QEMU; it needs no migration"
    if fault := fault_in(node["image"]):
        yield f"{image} cannot be moved: {fault}"


def unknown_image(plan: Plan, disk: PlannedDisk, nodes: Sequence[Mapping[str, Any]]) -> str:
    """Say that A's QEMU does not have this image, and what it has instead."""
    known = {file_of(each["file"]): each["node-name"] for each in nodes if each["drv"] not in _PROTOCOLS}
    names = ", ".join(f"{file} ({name})" for file, name in known.items())
    image, of = plan.called("image"), disk.node or "any disk"
    reason = f"{image}: {disk.image} is not the file of {of} in A's QEMU"
    return f"{reason}, which has {names or 'none'}; name it as QEMU does"
