"""Whether B has what the command line names and does not move: files, network interfaces, directories."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from recipes.checks.started import Started
from recipes.discovery.command_line.host_local import needed
from recipes.discovery.derive import made_paths
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import pasted


async def check_local(host_b: Host, started: Started, sockets: Sequence[str], limit: float) -> None:
    """Raise MigrationError for the first thing that is not on B.

    ``sockets`` are paths that will be listened on there besides those of the command line.
    """
    if started.command is None:
        return
    for option in started.command.options:
        for each in needed(option):
            if each.path.startswith("/") and not await host_b.test("-e", each.path, limit):
                raise MigrationError(
                    f"destination.qemu: B has not {each}; make it there as it is on A, or change that option"
                )
    for path in (*made_paths(started.command, "/"), *sockets):
        directory = posixpath.dirname(path)
        if not await host_b.test("-d", directory, limit):
            make = pasted(host_b.argv(["mkdir", "-p", directory]))
            raise MigrationError(f"there is no directory for {path} on B; make it: {make}")
