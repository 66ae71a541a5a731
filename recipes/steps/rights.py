"""Whether B's QEMU, whoever it runs as, can do what it has to later: open the guest's file, connect again.

QEMU opens its disks as whoever has started it; then it may become another user (``-runas``). So it is asked
to try both while it waits for the guest: nobody else is confined exactly as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from recipes.engines.choice import engine_for
from recipes.errors import MigrationError
from recipes.hosts.quoting import listed
from recipes.migrate.runtime import Migration
from recipes.plans.disks import PlannedDisk
from recipes.qemu.vm import CommandError

_USER = (
    "p=$1; "
    'while c=$(cat "/proc/$p/task/$p/children" 2>/dev/null) && [ -n "$c" ]; do p=${c%% *}; done; '
    'u=$(sed -n "s/^Uid:[^0-9]*[0-9]*[^0-9]*\\([0-9]*\\).*/\\1/p" "/proc/$p/status"); '
    'n=$(getent passwd "$u" | cut -d: -f1); '
    'echo "${n:-$u}"'
)
"""Prints who process $1 runs as; of a prefix such as sudo, what that has started."""


async def check_rights(m: Migration) -> None:
    """Raise MigrationError, which says what to write, where B's QEMU has no right to what it needs later."""
    for disk in m.disks:
        for what, node in engine_for(m).needed_later(m.plan, disk).items():
            await _check(m, disk, what, node)


async def _check(m: Migration, disk: PlannedDisk, what: str, node: Mapping[str, object]) -> None:
    """Let QEMU try one thing; the target as by default where it cannot open that as A's QEMU does."""
    plain = {key: value for key, value in node.items() if key not in disk.opening}
    refused = ""
    for tried in (node, plain):
        try:
            await _try(m, disk, tried)
            break
        except CommandError as error:
            if tried == plain:
                raise MigrationError(await _complaint(m, what, error.reason)) from error
            refused = error.reason
    if refused:
        words = [*(f"cache.{each}=on" for each in disk.cache), *([f"aio={disk.aio}"] if disk.aio else [])]
        m.report.note(
            f"B's QEMU cannot open {disk.target} with {listed(words)} ({refused}), and will use it without"
        )


async def _try(m: Migration, disk: PlannedDisk, node: Mapping[str, object]) -> None:
    """Open a node and close it again; CommandError where that cannot be."""
    name = f"{disk.drive}-access"
    await m.monitor_b.call("blockdev-add", {"node-name": name, **node})
    await m.monitor_b.execute("blockdev-del", node_name=name)


def explain_start(m: Migration, error: MigrationError) -> MigrationError:
    """Return why B's QEMU has not started, with what to write where it was not let to its disk."""
    why, there = str(error), m.plan.destination
    ours = any(path in why for disk in m.disks for path in engine_for(m).files(disk))
    if ours and "Permission denied" in why and not there.owner:
        return MigrationError(f"{why}; if it runs as another user, write that as owner in [destination]")
    return error


async def _complaint(m: Migration, what: str, reason: str) -> str:
    """Return the line that QEMU cannot do this; where it lacks the right, with who it is and what gives
    that.
    """
    if "denied" not in reason and "not permitted" not in reason:
        return f"destination.qemu: B's QEMU will not be able to {what}: {reason}"
    user = "another user"
    assert m.qemu
    with suppress(MigrationError):
        limit = m.plan.limits.command
        user = (await m.host_b.run("sh", "-c", _USER, "sh", str(m.qemu.pid), limit=limit)).strip() or user
    complaint = f"destination.qemu: B's QEMU runs as {user} and will not be able to {what} ({reason})"
    if any(disk.on_device and disk.target in what for disk in m.disks):
        return f"{complaint}; who may open a device is said by udev's rules, or until the next boot by chown"
    enter = f"let {user} enter each directory above it"
    if m.plan.destination.owner.partition(":")[0] == user:
        return f"{complaint}; {enter}"
    return f'{complaint}; write owner = "{user}" in [destination], and {enter}'
