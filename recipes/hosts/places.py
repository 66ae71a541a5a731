"""Where on a host the logs and process ids of what a migration starts there are kept.

The plan's log.directory, or else beside the disk, unless that is a block device: beside it are other devices,
in memory. What belongs to one of these is kept where a system keeps such things:

    root        /var/lib/nbd-migrate/NAME/
    others      $XDG_STATE_HOME/nbd-migrate/NAME/, by default in ~/.local/state

What belongs to a block device to which a disk moves is in the first of these, whoever runs the commands, or
where its ``state`` in the plan says.

NAME is the device's path as LVM writes paths: /dev/vg-a/lv is dev-vg--a-lv.

What nobody else may see, keys and the socket of a QEMU's NBD server, has a directory of its own there,
IMAGE.tls and IMAGE.exporter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from overlay.formats.device.map_place import name_of
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line

KEYS, NBD_SERVER = ".tls", ".exporter"
"""How the names of directories end that nobody else can enter: of keys, and of a QEMU's NBD server."""

_STATE = """
if test ! -b "$1"; then exit; fi;
if test "$(id -u)" = 0; then echo /var/lib; else echo "${XDG_STATE_HOME:-$HOME/.local/state}"; fi
"""
"""Says where the host keeps what is not beside the image $1; nothing when it is beside it."""


_LEFT = f"""
state() {{ {_STATE.strip()}; }};
name=$1; image=$2; shift 2; state=$(state "$image"); for suffix; do
if test -n "$state"; then p=$state/nbd-migrate/$name/${{image##*/}}$suffix; else p=$image$suffix; fi;
if test -e "$p" || test -L "$p"; then echo "$p"; fi;
done
"""
"""Says which of the things is there that would be beside the image $2, with these suffixes."""


_INSIDE = 'cd -P -- "$1" && test "$(stat -c %d:%i -- "$1")" = "$(stat -c %d:%i .)"'
"""Enters the directory $1 itself, and nothing that a link leads to: who may write above it may exchange it at
any time. From then on ``.`` is that directory, whatever becomes of its name."""

_FRESH = 'test -z "$(ls -A)" && case $(stat -c %u:%a .) in "$(id -u)":*700) true;; *) false;; esac'
"""Tells that it is one that was just made by us, and for nobody else."""


def removing(names: Sequence[str]) -> str:
    """Return a script that removes the directory $1 with these files, if it is there.

    What is not ours in it stays, and is an error.
    """
    files = " ".join(names)
    return f'if test -d "$1" && ! test -L "$1"; then ({_INSIDE} && rm -f -- {files}) && rmdir -- "$1"; fi;'


def making(names: Sequence[str]) -> str:
    """Return the beginning of a script, which makes the directory $1 for nobody else, and those above it.

    It takes the place of one with these files, as an earlier attempt may have left it. The rest of the script
    runs in it, and names it ``.``.
    """
    changed = "was exchanged by somebody while it was made"
    return (
        'umask 022; mkdir -p -- "${1%/*}" || exit; umask 077; '
        f'{{ {removing(names)} }} && mkdir -- "$1" || exit; '
        f'{{ {_INSIDE} && {_FRESH}; }} || {{ echo "$1 {changed}" >&2; exit 1; }};'
    )


async def beside(host: Host, image: str, suffix: str, limit: float) -> str:
    """Return the path of something that belongs to an image; raises as Host.run() does.

    Its QEMU can enter the directory in which the image is.
    """
    directory = await place_of(host, image, limit)
    return str(directory / f"{PurePosixPath(image).name}{suffix}")


async def left_beside(host: Host, image: str, suffixes: Sequence[str], limit: float) -> list[str]:
    """Return those of such paths at which something is; raises as Host.run() does."""
    words = (name_of(image), image, *suffixes)
    return (await host.run("sh", "-c", on_one_line(_LEFT), "sh", *words, limit=limit)).splitlines()


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
