"""Where on a host the logs and process ids of what a migration starts there are kept.

The plan's log.directory, or else beside the disk, unless that is a block device: beside it are other devices,
in memory. What belongs to one of these is kept where a system keeps such things:

    root        /var/lib/nbd-migrate/NAME/
    others      $XDG_STATE_HOME/nbd-migrate/NAME/, by default in ~/.local/state

NAME is the device's path as LVM writes paths: /dev/vg-a/lv is dev-vg--a-lv.
"""

from __future__ import annotations

import posixpath
from pathlib import PurePosixPath

from recipes.hosts.host import Host

_STATE = """
if test ! -b "$1"; then exit; fi;
if test "$(id -u)" = 0; then echo /var/lib; else echo "${XDG_STATE_HOME:-$HOME/.local/state}"; fi
"""
"""Says where the host keeps what is not beside the image $1; nothing when it is beside it."""


async def place_of(host: Host, image: str, limit: float) -> PurePosixPath:
    """Return the directory for what belongs to this image on this host; raises as Host.run() does."""
    script = " ".join(_STATE.split("\n"))
    state = (await host.run("sh", "-c", script, "sh", image, limit=limit)).strip()
    return PurePosixPath(state, "nbd-migrate", name_of(image)) if state else PurePosixPath(image).parent


def name_of(image: str) -> str:
    """Return a path as the name of one file; no two paths have the same."""
    parts = posixpath.normpath(image).strip("/").split("/")
    return "-".join(part.replace("-", "--") for part in parts)
