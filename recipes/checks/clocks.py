"""Whether both hosts have the same time, which a guest may take from them."""

from __future__ import annotations

import time

from recipes.errors import MigrationError
from recipes.hosts.host import Host

MOST = 2.0
"""Seconds by which two clocks may differ before that is told."""


async def check_clocks(host_a: Host, host_b: Host, limit: float) -> list[str]:
    """Return what may go wrong: by how much the clocks differ, where that is sure to be more than MOST."""
    ahead, doubt = 0.0, 0.0
    for host, sign in ((host_b, 1), (host_a, -1)):
        before = time.time()
        # Whole seconds: BusyBox has no parts of them.
        said = (await host.run("date", "+%s", limit=limit)).strip()
        after = time.time()
        if not said.isdecimal():
            raise MigrationError(f"date on {host.name} does not tell the time: {said!r}")
        ahead += sign * (int(said) + 0.5 - (before + after) / 2)
        doubt += 0.5 + (after - before) / 2
    if abs(ahead) - doubt <= MOST:
        return []
    which = "ahead of" if ahead > 0 else "behind"
    return [
        f"B's clock is {abs(ahead):.0f} s {which} A's, and the guest's may follow it; see that both hosts "
        "have the right time (chronyc tracking, timedatectl)"
    ]
