"""Whether the copies that B is said to have are there, and can be read."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from nbdserve.backends.probe import looks_like
from recipes.checks.space import Need
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line
from recipes.plans.plan import Plan

_LOOK = """
seed=$1;
if test ! -e "$seed"; then echo absent; exit; fi;
if test ! -f "$seed" && test ! -b "$seed"; then echo other; exit; fi;
if test ! -r "$seed"; then echo unreadable; exit; fi;
shift;
for target; do if test "$seed" -ef "$target"; then echo same; exit; fi; done;
PATH=$PATH:/usr/sbin:/sbin;
if test -b "$seed"; then size=$(blockdev --getsize64 "$seed") || exit;
else size=$(stat -L -c %s -- "$seed") || exit; fi;
echo "$size $(head -c 512 -- "$seed" | base64 -w 0)"
"""
"""Says in a word what is wrong with the seed $1, or its size and how it begins; the others are targets.

Who is not root may not have the directories of blockdev(8) on his PATH.
"""

_WRONG = {
    "absent": "is not there on B",
    "other": "is neither a file nor a block device on B",
    "unreadable": "cannot be read on B by who serves the disk there",
    "same": "is an image that this migration makes itself",
}


async def check_seeds(plan: Plan, needs: Sequence[Need], host_b: Host) -> list[str]:
    """Return what the operator may not expect of a seed. Raises MigrationError for one that is of no use."""
    warnings, limit = list[str](), plan.limits.command
    targets = [disk.target for disk in plan.disks]
    for disk, need in zip(plan.disks, needs, strict=True):
        if not disk.seed:
            continue
        where = f"{plan.called('seed')}: {disk.seed}"
        script = on_one_line(_LOOK)
        said = (await host_b.run("sh", "-c", script, "sh", disk.seed, *targets, limit=limit)).strip()
        if said in _WRONG:
            raise MigrationError(f"{where} {_WRONG[said]}; name another copy, or leave it out")
        size, _, begin = said.partition(" ")
        if kind := looks_like(base64.b64decode(begin)):
            raise MigrationError(f"{where} looks like a {kind} image; a seed must be raw (qemu-img convert)")
        if int(size) != need.size:
            warnings.append(f"{where} has {size} bytes, the disk {need.size}: all else is copied")
    return warnings
