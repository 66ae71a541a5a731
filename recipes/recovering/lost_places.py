"""Directories of sockets and logs that a reboot of their host has taken, as they were in memory."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable

from recipes.hosts.host import Host

IN_MEMORY = ("/run/", "/var/run/", "/tmp/", "/dev/shm/")
"""What is empty after a boot, or may be."""


async def make_lost(host: Host, paths: Iterable[str], limit: float) -> None:
    """See that the directories of these files are there, of those that a reboot may have taken.

    Others are somebody's to make, as before the migration. Raises as Host.run().
    """
    lost = {posixpath.dirname(path) for path in paths if path.startswith(IN_MEMORY)}
    if lost:
        await host.run("mkdir", "-p", "--", *sorted(lost), limit=limit)
