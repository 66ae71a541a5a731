"""Block devices on B, to which disks move: whether that can be, and where what belongs to them is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbdserve.common.sizes import format_size
from recipes.checks.space import Need
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line, pasted
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Plan

_CAN_BE_MADE = """
d=$1; while test ! -e "$d"; do d=${d%/*}; d=${d:-/}; done;
if test -d "$d" && test -w "$d" && test -x "$d"; then echo yes; else echo "$d"; fi
"""
"""Says yes where the directory $1 is there and may be written to, or can be made; else what is in the way."""


async def check_device(plan: Plan, disk: PlannedDisk, size: int, host_b: Host) -> None:
    """Raise MigrationError unless the disk, of ``size`` bytes, can move to its device on B."""
    key, limit, target = plan.called("target"), plan.limits.command, disk.target
    if not await host_b.test("-b", target, limit):
        raise MigrationError(
            f"{key}: there is no block device {target} on B; make it (lvcreate), of {size} bytes at least, "
            "or name a file"
        )
    script = on_one_line(_CAN_BE_MADE)
    said = (await host_b.run("sh", "-c", script, "sh", disk.directory, limit=limit)).strip()
    if said != "yes":
        raise MigrationError(
            f"disk.state: {disk.directory}, for what belongs to {target}, cannot be used on B, as nothing "
            f"may be made in {said}: name another directory as state in its [[disk]]"
        )
    told = await _looked_at(plan, disk, size, host_b)
    if told["holds"] == "overlay":
        discard = pasted(host_b.typed([host_b.tool("nbd-overlay"), "discard", target]))
        raise MigrationError(
            f"{key}: there is an overlay on {target} on B that is not complete; remove it if it is left from "
            f"an interrupted run, and holds nothing, with: {discard}"
        )
    if told["holds"] == "something" and target not in plan.destination.overwrite:
        raise MigrationError(
            f"{key}: there is something on {target} on B, which would be lost; if it is the right device, "
            f"say so: {pasted(['--overwrite', target])}, or in the plan overwrite under [destination]"
        )


async def device_warnings(plan: Plan, needs: Sequence[Need], host_b: Host) -> list[str]:
    """Return what the operator is told of the devices to which disks move."""
    found = []
    for disk, need in zip(plan.disks, needs, strict=True):
        if not disk.on_device:
            continue
        told = await _looked_at(plan, disk, need.size, host_b)
        if told["holds"] == "something":
            found.append(f"{disk.target} on B: what is on it is overwritten")
        more = int(told["device-size"]) - need.size
        if more:
            found.append(
                f"{disk.target} on B is {format_size(more)} larger than the disk: the guest sees none of "
                f"that until it is started anew; with size={need.size} on the raw node it never does"
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
