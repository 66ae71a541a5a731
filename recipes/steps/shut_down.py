"""Step 6: part B from A, end what is left on A, and put its disk out of reach."""

from __future__ import annotations

from nbdserve.exports.moved_images import MARKER, Standing
from recipes.channel import carriers, keys, single, through_qemu
from recipes.engines.choice import engine_for
from recipes.errors import MigrationError
from recipes.fencing.source_images import images_on_a, put_away
from recipes.hosts.quoting import listed
from recipes.migrate.progress import Moment
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase
from recipes.steps.causes import WANTED
from recipes.steps.cutover import end_source
from recipes.steps.without_guest import end_told, go_without_guest


async def shut_down(m: Migration) -> str:
    """Step 6: close the export, end the server, put the old disk out of reach, take the fence down."""
    m.enter(Phase.SHUT_DOWN)
    await detach(m)
    return await clear_source(m)


async def clear_source(m: Migration) -> str:
    """End what there still is on A, and put its disk out of reach."""
    limits, images = m.plan.limits, listed(disk.image for disk in m.disks)
    await single.part(m)
    if m.server:
        await m.server.stop(limits.stop)
        if m.server.status:
            m.report.note(f"the server on A {await m.server.wait()}; the disk was complete by then")
    if m.a.connected and m.state.exporter:
        # It was left as it served what could not be served from the files.
        await end_source(m)
    if m.a.connected:
        raise MigrationError(
            f"the disk is complete on B, but A's QEMU does not end; kill it before the fence (process "
            f"{m.fence.pid if m.fence else 'none'} on A) and never let its guest go on"
        )
    await put_out_of_reach(m)
    if m.fence:
        await m.fence.stop(limits.stop)
    await carriers.end(m)
    await through_qemu.forget(m)
    await keys.remove_all(m)
    known = m.guest_end
    await m.guest_has_ended()
    if m.guest_end and not known:
        m.report.note(f"{end_told(m.guest_end)}; its disk is complete")
    m.cleared = True
    if m.guest_end and not (m.guest_end.good and m.guest_end.reason in ("", *WANTED)):
        raise MigrationError(end_told(m.guest_end))
    was, are, it = ("were", "are", "them") if len(m.disks) > 1 else ("was", "is", "it")
    moved = [disk.moved for disk in m.state.disks if disk.moved]
    if m.plan.finish.move_aside:
        end = f"{images} {was} moved to {m.plan.finish.move_aside}"
    elif len(moved) == len(m.disks):
        end = f"{images} {are} {listed(moved)} now, out of date"
    else:
        end = f"{images} {are} out of date: never start a guest on {it}"
    return f"the server and A's QEMU have ended; {end}"


async def detach(m: Migration) -> None:
    """Part B's QEMU from all that is not its own files; where it has ended there is nothing to part."""
    try:
        for disk in m.disks:
            await engine_for(m).detach(m, disk)
        if not m.unattended:
            m.report.moment(Moment.PIVOTED)
        await end_what_carried(m)
    except MigrationError:
        if m.unattended or not await m.guest_has_ended():
            raise
        await go_without_guest(m)
        await end_what_carried(m)


async def end_what_carried(m: Migration) -> None:
    """End what the guest does not use any more."""
    for disk in m.disks:
        await engine_for(m).end(m, disk)


async def put_out_of_reach(m: Migration) -> None:
    """Put A's old disks out of reach for good; while the fence stands, so that nobody opens one before."""
    if m.plan.finish.move_aside:
        for disk, image in zip(m.disks, await images_on_a(m, m.disks), strict=True):
            await move_aside(m, disk.image, image, m.plan.moved_to(disk))
        return
    try:
        await put_away(m, Standing.OUT_OF_DATE)
    except MigrationError as error:
        m.report.note(str(error))


async def move_aside(m: Migration, name: str, image: str, target: str) -> None:
    """Move A's old disk, which was called ``name`` and is at ``image``, and remove its marker."""
    limit = m.plan.limits.command
    if not await m.host_a.test("-e", target, limit) or await m.host_a.test("-e", image, limit):
        await m.host_a.run("mv", "--no-target-directory", "--no-clobber", "--", image, target, limit=limit)
        if image != target and await m.host_a.test("-e", image, limit):
            raise MigrationError(
                f"the disk is complete on B, but {image} on A could not be moved to {target}"
            )
    await m.host_a.run("rm", "-f", "--", f"{name}{MARKER}", limit=limit)
