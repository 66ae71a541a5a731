"""Step 2: an image on B for each disk, whose backing is the disk's export."""

from __future__ import annotations

import asyncio

from recipes.channel import tls
from recipes.engines.choice import engine_for
from recipes.errors import MigrationError
from recipes.hosts.interruption import completed
from recipes.hosts.quoting import listed
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
    return listed(f"{disk.target} over {m.plan.export_of(disk)}" for disk in m.disks)


async def create(m: Migration, disk: PlannedDisk) -> None:
    """Create the image of one disk."""
    uri, limit, before = str(tls.disk_uri(m, disk)), m.plan.limits.start, m.state.made
    size, engine = m.state.disk(disk).size, engine_for(m)
    argv = [m.host_b.tool("nbd-overlay"), "create", "--backing", uri, "--size", str(size)]
    argv += ["--layout", engine.layout, *m.plan.destination.ownership("--"), disk.target]
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
