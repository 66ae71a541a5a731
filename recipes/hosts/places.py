"""Where on a host the logs and process ids of what a migration starts there are kept.

The plan's log.directory, or else beside the disk, unless that is a block device: beside it are other devices,
in memory. What belongs to one of these is kept where a system keeps such things:

    root        /var/lib/nbd-migrate/NAME/
    others      $XDG_STATE_HOME/nbd-migrate/NAME/, by default in ~/.local/state

What belongs to a block device to which a disk moves is in the first of these, whoever runs the commands, or
where its ``state`` in the plan says.

NAME is the device's path as LVM writes paths: /dev/vg-a/lv is dev-vg--a-lv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from overlay.formats.device.map_place import name_of
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line

_STATE = """
if test ! -b "$1"; then exit; fi;
if test "$(id -u)" = 0; then echo /var/lib; else echo "${XDG_STATE_HOME:-$HOME/.local/state}"; fi
"""
"""Says where the host keeps what is not beside the image $1; nothing when it is beside it."""


async def place_of(host: Host, image: str, limit: float) -> PurePosixPath:
    """Return the directory for what belongs to this image on this host; raises as Host.run() does."""
    script = on_one_line(_STATE)
    state = (await host.run("sh", "-c", script, "sh", image, limit=limit)).strip()
    return PurePosixPath(state, "nbd-migrate", name_of(image)) if state else PurePosixPath(image).parent


class Places:
    """Where what belongs to the images of a migration is kept; for each its host is asked once."""

    def __init__(
        self,
        directory: str,
        images: Sequence[Sequence[str]],
        limit: float,
        known: Mapping[tuple[Host, str], str] | None = None,
    ) -> None:
        """``directory`` is the plan's log.directory; ``images`` are those of each host; ``known`` are
        directories of images that need not be asked for.
        """
        self._directory = directory
        self._images = images
        self._limit = limit
        said = {} if directory else known or {}
        self._known = {image: Path(place) for image, place in said.items()}

    async def place(self, host: Host, image: str, suffix: str) -> Path:
        """Return where log and pid file of what belongs to an image are, without ``.log`` and ``.pid``."""
        if (host, image) not in self._known:
            directory = self._directory or await place_of(host, image, self._limit)
            self._known[host, image] = Path(directory)
        return self._known[host, image] / f"{self._stem(image)}.{suffix}"

    def _stem(self, image: str) -> str:
        """Return the image's name; in a directory that several share, one that no other has."""
        name = Path(image).name
        shared = any(
            image in side and [Path(each).name for each in side].count(name) > 1 for side in self._images
        )
        return name_of(image) if shared and self._directory else name
