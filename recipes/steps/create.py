"""Step 2: the image on B whose backing is the export."""

from __future__ import annotations

import asyncio

from recipes.engines.choice import engine_for
from recipes.errors import MigrationError
from recipes.hosts.interruption import completed
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase, Role


async def create_overlay(m: Migration) -> str:
    """Step 2: create the image on B whose backing is the export."""
    m.enter(Phase.OVERLAY)
    image, uri, limit = m.plan.destination.image, str(m.plan.export.address), m.plan.limits.start
    tool = m.host_b.tool("nbd-overlay")
    argv = [tool, "create", "--backing", uri, "--size", str(m.disk.size), "--layout", engine_for(m).layout]
    argv += [*m.plan.destination.ownership("--"), image]

    async def create() -> None:
        m.remove_later(image)
        maker = await m.run("nbd-overlay create", Role.OVERLAY, "overlay", argv)
        try:
            async with asyncio.timeout(limit):
                end = await maker.wait()
        except TimeoutError as error:
            await maker.stop(m.plan.limits.stop)
            raise MigrationError(f"nbd-overlay create on B took longer than {limit:g} s") from error
        if maker.status == 0:
            m.remove_later(*engine_for(m).files(m.plan))
        elif maker.status is not None and maker.status > 0:
            # It has refused, or failed and undone what it had done.
            m.remove_later()
        if maker.status:
            raise MigrationError(f"nbd-overlay create on B {end}")

    # To its end in any case, so that nobody has to guess what it has come to.
    await completed(create())
    m.refuse_the_dead()
    return f"{image} over {uri}"
