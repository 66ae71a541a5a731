"""This project on another host: where it is there, and that it is of our version."""

from __future__ import annotations

import sys
from pathlib import Path, PurePosixPath

from nbdserve import __version__
from recipes.errors import MigrationError
from recipes.hosts.calls import HostError
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line

PLACE = "/opt/nbd-migrate/bin"
"""Where README.md installs it."""

_FIND = """
p=$(command -v nbdserve) || for d in "$@"; do if test -x "$d/nbdserve"; then p=$d/nbdserve; break; fi; done;
if test -n "$p"; then echo "$p"; fi
"""
"""Says where nbdserve is: on the PATH, or else in one of the directories."""


async def find_commands(host: Host, key: str, limit: float) -> str:
    """Return the directory of our commands on a host that has an address.

    Raises HostError where the host cannot be reached, MigrationError where they are not there; ``key`` is
    that of the plan that would say where they are.
    """
    places = [str(Path(sys.executable).parent), PLACE]
    found = (await host.run("sh", "-c", on_one_line(_FIND), "sh", *places, limit=limit)).strip()
    if not found.startswith("/"):
        raise MigrationError(
            f"there is no nbdserve on {host.name}: it is not on the PATH of {host.address}, nor in "
            f"{' or '.join(places)}; install this project there, or write where it is as {key}"
        )
    return str(PurePosixPath(found).parent)


async def check_version(host: Host, limit: float) -> None:
    """Raise MigrationError unless this project is there in our own version."""
    program = host.tool("nbdserve")
    try:
        said = (await host.run(program, "--version", limit=limit)).strip()
    except HostError:
        raise
    except MigrationError as error:
        raise MigrationError(f"{program} on {host.name} does not say its version: {error}") from error
    version = said.rpartition(" ")[2] or "unknown"
    if version != __version__:
        raise MigrationError(
            f"{program} on {host.name} is of version {version}, and this is {__version__}: install the same "
            "one on both"
        )
