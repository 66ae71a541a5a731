"""What nbd-overlay says of an image on a host."""

from __future__ import annotations

from typing import Any

from recipes.errors import MigrationError
from recipes.hosts.host import Host


async def image_facts(host: Host, image: str, limit: float) -> dict[str, Any]:
    """Return what nbd-overlay says of an image on a host, also of one in use.

    Raises MigrationError as ``Host.told``.
    """
    return await host.told(host.tool("nbd-overlay"), "info", "-U", "--json", image, limit=limit)


async def holds_something(
    host: Host, image: str, limit: float, *, copies: bool = False, is_disk: bool = True
) -> bool:
    """Tell whether anything of a disk is in an image; with ``copies`` only what a guest wrote counts.

    ``is_disk`` says what an image without a backing is: a complete disk, or none of ours. Raises as
    ``image_facts``, also if that is not told.
    """
    if not await host.test("-e", image, limit):
        return False
    facts = await image_facts(host, image, limit)
    if "backing-filename" not in facts:
        return is_disk
    if copies and "written-size" in facts:
        return bool(facts["written-size"])
    if "local-size" not in facts:
        raise MigrationError(f"{image} on {host.name} does not tell how much of the disk it holds")
    return bool(facts["local-size"])
