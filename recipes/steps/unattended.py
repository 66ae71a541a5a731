"""The disk of a guest that has ended on B before all of it was there: it is copied to the end without it.

Nothing is lost by a guest's end: what it wrote is in the image on B, and the rest on A. nbd-overlay can copy
into images of either layout, whoever did so before.
"""

from __future__ import annotations

import json

from nbdserve.common.errors import MigrationError
from recipes.migrate.runtime import GuestEnd, Migration
from recipes.steps.causes import described
from recipes.steps.engines import OverlayEngine


class Unattended(OverlayEngine):
    """nbd-overlay has the disk, and nobody is its client."""

    def __init__(self, layout: str) -> None:
        self.layout = layout

    async def confirm(self, m: Migration) -> None:
        """The image must need no backing any more."""
        tool, image = m.host_b.tool("nbd-overlay"), m.plan.destination.image
        answer = await m.host_b.run(tool, "info", "-U", "--json", image, limit=m.plan.limits.command)
        if "backing-filename" in json.loads(answer):
            raise MigrationError(f"{image} is not complete: it has a backing, {tool} info says")

    async def detach(self, m: Migration) -> None:
        """End nbd-overlay: there is no guest that would have to pivot."""
        await self.end_overlay(m)


async def go_without_guest(m: Migration) -> None:
    """From now on the disk is all that is left to do: B's QEMU has ended."""
    if m.guest_end:
        m.report.note(f"{told(m.guest_end)}; its disk is completed without it")
    m.no_longer_need("B's QEMU")
    if m.b:
        await m.b.disconnect()
        m.b = None
    m.engine = Unattended(m.engine.layout)


def told(end: GuestEnd) -> str:
    """What has become of the guest, for the operator."""
    return described(end.reason, "B") if end.reason else end.how
