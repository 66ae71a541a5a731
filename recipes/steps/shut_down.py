"""Step 6: part B from A, end what is left on A, and put its disk out of reach."""

from __future__ import annotations

from recipes.engines.choice import engine_for
from recipes.errors import MigrationError
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase
from recipes.steps.causes import WANTED
from recipes.steps.without_guest import end_told, go_without_guest


async def shut_down(m: Migration) -> str:
    """Step 6: close the export, end the server, put the old disk out of reach, take the fence down."""
    m.enter(Phase.SHUT_DOWN)
    await detach(m)
    return await clear_source(m)


async def clear_source(m: Migration) -> str:
    """End what there still is on A, and put its disk out of reach."""
    limits, image, target = m.plan.limits, m.plan.source.image, m.plan.finish.move_aside
    if m.server:
        await m.server.stop(limits.stop)
        if m.server.status:
            m.report.note(f"the server on A {await m.server.wait()}; the disk was complete by then")
    if m.a.connected:
        raise MigrationError(
            f"the disk is complete on B, but A's QEMU does not end; kill it before the fence (process "
            f"{m.fence.pid if m.fence else 'none'} on A) and never let its guest go on"
        )
    if target:
        await move_aside(m, image, target)
    if m.fence:
        await m.fence.stop(limits.stop)
    known = m.guest_end
    await m.guest_has_ended()
    if m.guest_end and not known:
        m.report.note(f"{end_told(m.guest_end)}; its disk is complete")
    m.cleared = True
    if m.guest_end and not (m.guest_end.good and m.guest_end.reason in ("", *WANTED)):
        raise MigrationError(end_told(m.guest_end))
    end = f"{image} was moved to {target}" if target else f"{image} is out of date: never start a guest on it"
    return f"the server and A's QEMU have ended; {end}"


async def detach(m: Migration) -> None:
    """Part B's QEMU from all that is not its own file; where it has ended there is nothing to part."""
    try:
        await engine_for(m).detach(m)
    except MigrationError:
        if not await m.guest_has_ended():
            raise
        await go_without_guest(m)
        await engine_for(m).detach(m)


async def move_aside(m: Migration, image: str, target: str) -> None:
    """Put A's old disk out of reach; while the fence stands, so that nobody opens it in between."""
    limit = m.plan.limits.command
    if await m.host_a.test("-e", target, limit) and not await m.host_a.test("-e", image, limit):
        return
    await m.host_a.run("mv", "--no-target-directory", "--no-clobber", "--", image, target, limit=limit)
    if await m.host_a.test("-e", image, limit):
        raise MigrationError(f"the disk is complete on B, but {image} on A could not be moved to {target}")
