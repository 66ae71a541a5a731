"""Step 2: an image on B for each disk, whose backing is the disk's export."""

from __future__ import annotations

import asyncio

from recipes.channel import tls
from recipes.checks.other_media import flash_sizes
from recipes.engines.choice import engine_for
from recipes.errors import MigrationError
from recipes.hosts.interruption import completed
from recipes.hosts.quoting import listed, on_one_line
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase, Role
from recipes.plans.disks import PlannedDisk


async def create_overlay(m: Migration) -> str:
    """Step 2: create the images on B whose backings are the exports."""
    m.enter(Phase.OVERLAY)
    for disk in m.disks:
        # To its end in any case, so that nobody has to guess what it has come to.
        await completed(create(m, disk))
        m.refuse_the_dead()
    for flash, size in zip(m.plan.flash, await flash_sizes(m.plan, m.a), strict=True):
        await completed(create_flash(m, flash.target, size))
    return listed(f"{disk.target} over {m.plan.export_of(disk)}" for disk in m.disks)


_NOT_MADE = "nothing was made there"
"""In what is said where nothing was."""

_FLASH = f"""
umask 077; set -C; f=/proc/self/fd/3;
why=$({{ {{
truncate -s "$2" -- $f || exit 3;
if test -n "$4"; then chmod -- "$4" $f || exit 3; fi; if test -n "$3"; then chown -- "$3" $f || exit 3; fi;
}} 3> "$1"; }} 2>&1) && exit; code=$?;
if test $code = 3; then echo "$why" >&2; else echo "$why ({_NOT_MADE})" >&2; fi; exit 1
"""
"""Makes the file $1 of $2 bytes, for the user $3 with the mode $4; says so where it is there, or cannot be.

Each shell has its own words for that. The file is named by its descriptor, as who may write to its directory
may exchange it at any time.
"""


async def create_flash(m: Migration, target: str, size: int) -> None:
    """Make the file of a flash chip. B's QEMU writes to it what the guest has in it, when that arrives."""
    there, before = m.plan.destination, m.state.made
    m.record(made=(*before, target))
    words = ("sh", "-c", on_one_line(_FLASH), "sh", target, str(size), there.owner, there.mode)
    try:
        await m.host_b.run(*words, limit=m.plan.limits.command)
    except MigrationError as error:
        if _NOT_MADE in str(error):
            # It is somebody else's, or none.
            m.record(made=before)
        raise MigrationError(f"flash.target: {target} cannot be made on B: {error}") from error


def placed(m: Migration, disk: PlannedDisk) -> list[str]:
    """Return the words that say whose the image is; on a device, where its map is, and whether to overwrite
    what is there.
    """
    if disk.on_device:
        # Something may have come there since step 1.
        force = ["--force"] if disk.target in m.plan.destination.overwrite else []
        return ["--map", disk.map, *force]
    return m.plan.destination.ownership("--")


async def create(m: Migration, disk: PlannedDisk) -> None:
    """Create the image of one disk."""
    uri, limit, before = str(tls.disk_uri(m, disk)), m.plan.limits.start, m.state.made
    size, engine = m.state.disk(disk).size, engine_for(m)
    argv = [m.host_b.tool("nbd-overlay"), "create", "--backing", uri, "--size", str(size)]
    argv += ["--layout", engine.layout, *placed(m, disk), disk.target]
    # From now on it may be there, and is removed when the guest stays on A.
    m.record(made=(*before, disk.target))
    maker = await m.run("nbd-overlay create", Role.OVERLAY, argv, drive=disk.drive)
    try:
        async with asyncio.timeout(limit):
            end = await maker.wait()
    except TimeoutError as error:
        await maker.stop(m.plan.limits.stop)
        raise MigrationError(f"nbd-overlay create on B took longer than {limit:g} s") from error
    if maker.status == 0:
        m.record(made=(*before, *engine.files(disk)))
    elif maker.status is not None and maker.status > 0:
        # It has refused, or failed and undone what it had done.
        m.record(made=before)
    if maker.status:
        raise MigrationError(f"nbd-overlay create on B {end}")
