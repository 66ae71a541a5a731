"""Disk and RAM as they are: A's server lets nobody in but B."""

from __future__ import annotations

from recipes.migrate.runtime import Migration
from recipes.plans.channel import PLAIN


async def server_options(m: Migration) -> list[str]:
    """Return the words for A's server, which has to know the address that B comes from.

    Raises MigrationError where B has no way to A.
    """
    address = m.plan.export.address
    if m.plan.channel.kind != PLAIN or address.socket is not None:
        return []
    look = m.host_b.own("route", address.host, str(address.port))
    answer = await m.host_b.told(*look, limit=m.plan.limits.command)
    # An interface has another name on the other side.
    return ["--allow", str(answer["address"]).partition("%")[0]]
