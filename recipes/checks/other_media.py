"""What the guest has besides its disks: read-only disks and media, which B must have, and its flash chips."""

from __future__ import annotations

import asyncio
from pathlib import PurePosixPath

from nbdserve.common.errors import UsageError
from recipes.checks.disk_nodes import may_be
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line
from recipes.plans.plan import Plan
from recipes.qemu.vm import Vm

_LOOK = """
test -f "$1" || exit 0;
trap "exit 1" TERM;
size=$(stat -L -c %s -- "$1") || exit; blocks=$(((size + 1048575) / 1048576)); most=64;
if test "$blocks" -le "$most"; then sum=$(sha256sum < "$1") || exit;
else
sum=$(n=0; while test "$n" -lt "$most"; do
dd if="$1" bs=1048576 count=1 skip=$((n * (blocks - 1) / (most - 1))) status=none || { kill "$$"; exit 1; };
n=$((n + 1));
done | sha256sum) || exit;
fi;
echo "$size $sum"
"""
"""Says of the file $1 how long it is and what is in it: of more than 64 MiB so much at as many places, from
the first to the last; nothing where there is none. What cannot be read is a failure: of a pipe a shell knows
only how its last command has ended."""


async def check_same(plan: Plan, host_a: Host, host_b: Host) -> None:
    """Raise MigrationError for the first of ``destination.same`` that is not on B as it is on A."""
    # Up to 64 MiB are read, which takes as long as the disk does.
    limit = plan.limits.stall
    for path in plan.destination.same:
        here, there = await asyncio.gather(look(host_a, path, limit), look(host_b, path, limit))
        remedy = (
            "copy it there, or take it out of the guest on A, and of destination.same and destination.qemu"
        )
        if not here:
            raise MigrationError(f"destination.same: there is no file {path} on A")
        if not there:
            raise MigrationError(f"destination.same: {path}, which the guest reads, is not on B: {remedy}")
        if here != there:
            raise MigrationError(
                f"destination.same: {path} is not on B as it is on A ({described(there)} and "
                f"{described(here)}): {remedy}"
            )


async def look(host: Host, path: str, limit: float) -> str:
    """Return what tells a file of this content from others; nothing where there is none."""
    return (await host.run("sh", "-c", on_one_line(_LOOK), "sh", path, limit=limit)).strip()


def described(said: str) -> str:
    """Return in words what was found of a file."""
    size, digest = said.split()[:2]
    return f"{size} bytes, {digest[:8]}..."


async def flash_sizes(plan: Plan, a: Vm) -> list[int]:
    """Return the size of each of the plan's in bytes; UsageError for one that A's QEMU does not have."""
    if not plan.flash:
        return []
    media = [each["inserted"] for each in await a.execute("query-block") if "inserted" in each]
    sizes = []
    for flash in plan.flash:
        of_it = [each["image"]["virtual-size"] for each in media if may_be(each["file"], flash.image)]
        if not of_it:
            raise UsageError(f"flash.image: {flash.image} is in no drive of A's QEMU; name it as QEMU does")
        sizes.append(int(of_it[0]))
    return sizes


async def check_flash(plan: Plan, a: Vm, host_b: Host) -> None:
    """Raise UsageError or MigrationError where one is not on A, or something is in its place on B."""
    await flash_sizes(plan, a)
    places = [(flash.target, str(PurePosixPath(flash.target).parent)) for flash in plan.flash]
    asked = [each for place, above in places for each in (("-e", place), ("-L", place), ("-d", above))]
    answers = iter(await host_b.tests(asked, plan.limits.command) if asked else [])
    for flash in plan.flash:
        is_taken, is_link, is_there = next(answers), next(answers), next(answers)
        if is_taken or is_link:
            raise MigrationError(
                f"flash.target: {flash.target} exists on B; remove it, as all that the guest has in it comes "
                "from A, or choose another name, there and in destination.qemu"
            )
        if not is_there:
            raise MigrationError(f"flash.target: there is no directory for {flash.target} on B")
