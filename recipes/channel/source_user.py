"""Who A's QEMU runs as: what it has to read or to make must be its own."""

from __future__ import annotations

from recipes.errors import MigrationError
from recipes.hosts.calls import HostError
from recipes.migrate.runtime import Migration


async def source_user(m: Migration) -> str:
    """Return the user; nothing where that is not known, or needs no rights of its own. Raises HostError."""
    try:
        look = m.host_a.own("process", m.plan.source.qmp)
        answer = await m.host_a.told(*look, limit=m.plan.limits.command)
    except HostError:
        raise
    except MigrationError:
        # Another's process, perhaps: then its QEMU says whether it may read what is ours.
        return ""
    return str(answer["user"])
