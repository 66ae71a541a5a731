"""What is said of an image on a host: by nbd-overlay, and by the system."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line

_FILES = on_one_line("""
for p; do
if test -b "$p"; then set -- $(stat -L -c "0x%t 0x%T" -- "$p");
read -r n < "/sys/dev/block/$(($1)):$(($2))/size"; echo "device $(($1)):$(($2)) $((n * 512))";
elif test -e "$p"; then stat -L -c "inode %d:%i %s" -- "$p";
else echo; fi;
done
""")
"""Says of each path, on a line, what no other file has, and its bytes; nothing where nothing is there."""


async def files_at(host: Host, paths: Sequence[str], limit: float) -> list[str]:
    """Return for each path what tells the file, or device, there from any other, and how long it is.

    Empty where there is none. Raises as Host.run().
    """
    said = await host.run("sh", "-c", _FILES, "sh", *paths, limit=limit)
    return said.split("\n")[: len(paths)]


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
