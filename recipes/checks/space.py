"""Whether B has the space for the disks: for what they hold now, and for all that they may ever hold."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from nbdserve.common.sizes import format_size
from overlay.formats.device.map_place import is_among_devices
from overlay.formats.flat import create as flat
from overlay.formats.image import Backing
from overlay.formats.qed import create as qed
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Plan

LOGS = 1 << 20
"""Bytes that are set aside for the logs of what carries a disk; they are some lines as a rule."""

_FREE = on_one_line("""
for d; do while test ! -e "$d"; do d=${d%/*}; d=${d:-/}; done; stat -f --format="%i %a %S" -- "$d"; done
""")
"""Says of each directory, or of the one above in which it will be made: the file system, and what is free."""


@dataclass(frozen=True)
class Need:
    """Something that is made on B: where, and how many bytes it needs."""

    target: str
    size: int


@dataclass(frozen=True)
class Shortage:
    """A file system on B with less room than is needed: of which directory, and how many bytes."""

    directory: str
    free: int
    needed: int


def beside(plan: Plan, disk: PlannedDisk, size: int) -> list[Need]:
    """Return what a disk of ``size`` bytes needs on B besides its content: a map or tables, and logs."""
    backing = Backing(str(plan.export_of(disk)), raw=True)
    if plan.by_overlay:
        tables = Need(disk.map, flat.new_header(size, (backing,)).map_bytes)
    else:
        tables = Need(disk.target, qed.new_header(size, backing).metadata_bytes)
    return [tables, Need(posixpath.join(plan.log.directory or disk.directory, "log"), LOGS)]


async def shortages(needs: Sequence[Need], host_b: Host, limit: float) -> list[Shortage]:
    """Compare what is needed in each file system with what is free there; one for each with too little."""
    # What is on a block device has the space that it has.
    needs = [need for need in needs if not is_among_devices(need.target)]
    if not needs:
        return []
    directories = [str(PurePosixPath(need.target).parent) for need in needs]
    said = await host_b.run("sh", "-c", _FREE, "sh", *directories, limit=limit)
    found: dict[str, Shortage] = {}
    for need, directory, line in zip(needs, directories, said.splitlines(), strict=True):
        file_system, blocks, block = line.split()
        before = found.get(file_system, Shortage(directory, 0, 0))
        found[file_system] = Shortage(before.directory, int(blocks) * int(block), before.needed + need.size)
    return [each for each in found.values() if each.needed > each.free]


async def check_space(plan: Plan, needs: Sequence[Need], host_b: Host, limit: float) -> list[str]:
    """Compare the sizes of the disks, and what is beside them, with what is free; tell what may go wrong."""
    more = [
        each for disk, need in zip(plan.disks, needs, strict=True) for each in beside(plan, disk, need.size)
    ]
    return [
        f"{each.directory} on B: {format_size(each.free)} are free, and the disks may grow to "
        f"{format_size(each.needed)}, with what is beside them; when it is full the guest waits"
        for each in await shortages([*needs, *more], host_b, limit)
    ]
