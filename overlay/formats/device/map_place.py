"""Where the map of a block device is kept: never beside its node, which is gone at the next boot.

    root        /var/lib/nbd-overlay/NAME.map
    others      $XDG_STATE_HOME/nbd-overlay/NAME.map, by default in ~/.local/state

NAME is the device's path as LVM writes paths: /dev/vg-a/lv is dev-vg--a-lv. The trailer on the device names
the map, so that whoever opens the device finds it, by whatever path he names that.
"""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

from nbdserve.common.errors import UsageError


def name_of(path: str) -> str:
    """Return a path as the name of one file; no two have the same, but for hyphens that begin a part."""
    parts = posixpath.normpath(path).strip("/").split("/")
    return "-".join(part.replace("-", "--") for part in parts)


def is_among_devices(path: str) -> bool:
    """Tell whether an absolute path is below /dev, but for /dev/shm, which is for files."""
    parts = posixpath.normpath(path).strip("/").split("/")
    return parts[0] == "dev" and parts[1:2] != ["shm"]


def default_map(device: Path) -> Path:
    """Return where the map of a device is made that nobody says another place for."""
    if os.geteuid() == 0:
        state = Path("/var/lib")
    else:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    return state / "nbd-overlay" / f"{name_of(os.path.abspath(device))}.map"


def check_map(path: Path) -> Path:
    """Return the absolute path of a map; UsageError unless that can be one of a device."""
    found = Path(os.path.abspath(path))
    if is_among_devices(os.path.realpath(found)):
        raise UsageError(f"--map {path}: it is among the devices, which are in memory; name a file on a disk")
    return found
