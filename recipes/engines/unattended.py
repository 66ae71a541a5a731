"""nbd-overlay has the disk of a guest that has ended on B before all of it was there.

Nothing is lost by a guest's end: what it wrote is in the image on B, and the rest on A. nbd-overlay can copy
into images of either layout, whoever did so before.
"""

from __future__ import annotations

import json

from recipes.engines.overlay_engine import OverlayEngine
from recipes.errors import MigrationError
from recipes.migrate.runtime import Migration


class Unattended(OverlayEngine):
    """nbd-overlay has the disk, and nobody is its client."""

    def __init__(self, layout: str) -> None:
        self.layout = layout

    async def confirm(self, m: Migration) -> None:
        """See that the image needs no backing any more."""
        tool, image = m.host_b.tool("nbd-overlay"), m.plan.destination.image
        answer = await m.host_b.run(tool, "info", "-U", "--json", image, limit=m.plan.limits.command)
        if "backing-filename" in json.loads(answer):
            raise MigrationError(f"{image} is not complete: it has a backing, {tool} info says")

    async def detach(self, m: Migration) -> None:
        """End nbd-overlay: there is no guest that would have to pivot."""
        await self.end_overlay(m)
