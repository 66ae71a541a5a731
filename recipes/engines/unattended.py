"""nbd-overlay has the disk of a guest that has ended on B before all of it was there.

Nothing is lost by a guest's end: what it wrote is in the image on B, and the rest on A. nbd-overlay can copy
into images of either layout, whoever did so before.
"""

from __future__ import annotations

from recipes.engines.overlay_engine import OverlayEngine
from recipes.errors import MigrationError
from recipes.hosts.images import image_facts
from recipes.migrate.runtime import Migration
from recipes.plans.disks import PlannedDisk


class Unattended(OverlayEngine):
    """nbd-overlay has the disk, and nobody is its client."""

    def __init__(self, layout: str) -> None:
        self.layout = layout

    async def confirm(self, m: Migration, disk: PlannedDisk) -> None:
        """See that the image needs no backing any more."""
        if "backing-filename" in await image_facts(m.host_b, disk.target, m.plan.limits.command):
            tool = m.host_b.tool("nbd-overlay")
            raise MigrationError(f"{disk.target} is not complete: it has a backing, {tool} info says")

    async def detach(self, m: Migration, disk: PlannedDisk) -> None:
        """Nothing: there is no guest that would have to pivot."""
