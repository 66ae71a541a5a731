"""Block devices on B, to which disks move: whether that can be, and where what belongs to them is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbdserve.common.sizes import format_size
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line, pasted
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Plan

_CAN_BE_MADE = on_one_line("""
for d; do while test ! -e "$d"; do d=${d%/*}; d=${d:-/}; done;
if test -d "$d" && test -w "$d" && test -x "$d"; then echo; else echo "$d"; fi; done
""")
"""Says of each directory, on a line, what is in the way of making something in it; nothing if none is."""


async def check_devices(plan: Plan, sizes: Sequence[int], host_b: Host) -> list[str]:
    """Return what the operator is told of the devices to which disks of these sizes move.

    Raises MigrationError where one cannot.
    """
    moves = [(disk, size) for disk, size in zip(plan.disks, sizes, strict=True) if disk.on_device]
    if not moves:
        return []
    key, limit = plan.called("target"), plan.limits.command
    there = await host_b.tests([("-b", disk.target) for disk, _ in moves], limit)
    places = [disk.directory for disk, _ in moves]
    said = (await host_b.run("sh", "-c", _CAN_BE_MADE, "sh", *places, limit=limit)).split("\n")
    for (disk, size), is_there, obstacle in zip(moves, there, said[: len(moves)], strict=True):
        if not is_there:
            raise MigrationError(
                f"{key}: there is no block device {disk.target} on B; make it (lvcreate), of {size} bytes at "
                "least, or name a file"
            )
        if obstacle:
            raise MigrationError(
                f"disk.state: {disk.directory}, for what belongs to {disk.target}, cannot be used on B, as "
                f"nothing may be made in {obstacle}: name another directory as state in its [[disk]]"
            )
    return [line for move in moves for line in await _warnings(plan, *move, host_b)]


async def _warnings(plan: Plan, disk: PlannedDisk, size: int, host_b: Host) -> list[str]:
    """Return what is told of one; MigrationError where what is on it is not to be overwritten."""
    key, target = plan.called("target"), disk.target
    told = await _looked_at(plan, disk, size, host_b)
    if told["holds"] == "overlay":
        discard = pasted(host_b.typed([host_b.tool("nbd-overlay"), "discard", target]))
        raise MigrationError(
            f"{key}: there is an overlay on {target} on B that is not complete; remove it if it is left from "
            f"an interrupted run, and holds nothing, with: {discard}"
        )
    found = []
    if told["holds"] == "something":
        if target not in plan.destination.overwrite:
            raise MigrationError(
                f"{key}: there is something on {target} on B, which would be lost; if it is the right "
                f"device, say so: {pasted(['--overwrite', target])}, or in the plan overwrite under "
                "[destination]"
            )
        found.append(f"{target} on B: what is on it is overwritten")
    if more := int(told["device-size"]) - size:
        found.append(
            f"{target} on B is {format_size(more)} larger than the disk: the guest sees none of that until "
            f"it is started anew; with size={size} on the raw node it never does"
        )
    return found


async def make_places(host_b: Host, plan: Plan) -> None:
    """Make the directories on B for what belongs to such devices; they stay, as logs are in them."""
    places = [disk.directory for disk in plan.disks if disk.on_device]
    if places:
        script = 'umask 022; mkdir -p -- "$@"'
        await host_b.run("sh", "-c", script, "sh", *places, limit=plan.limits.command)


async def _looked_at(plan: Plan, disk: PlannedDisk, size: int, host_b: Host) -> dict[str, Any]:
    words = ["--check", "--force", "--map", disk.map, "--size", str(size)]
    words += ["--backing", str(plan.export_of(disk)), disk.target]
    try:
        return await host_b.told(host_b.tool("nbd-overlay"), "create", *words, limit=plan.limits.command)
    except MigrationError as error:
        raise MigrationError(f"{plan.called('target')}: {error}") from error
