"""Markers of images whose guest has moved to another host: they are out of date, and nobody uses them so.

    IMAGE.moved         the image itself: who opens IMAGE finds nothing, also after a reboot
    IMAGE.moved.json    the marker, which says where the guest went, and when

A block device keeps its name. Its marker is where a system keeps what belongs to one:

    root        /var/lib/nbd-migrate/DEVICE/NAME.moved.json
    others      $XDG_STATE_HOME/nbd-migrate/..., by default in ~/.local/state

Who moves an image, and back: recipes/fencing/moving.py. Whoever opens one to write to it asks refuse_moved().
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Self

from nbdserve.common.errors import ImageError

MOVED, MARKER = ".moved", ".moved.json"
"""How the names of an image that was moved, and of its marker, end."""

VERSION = 1
"""Of markers; another is refused."""


_WORDS = ("image", "moved", "migration", "to")
"""Fields of a marker that are text."""


class Standing(Enum):
    """What an image that is marked is good for; the value is written."""

    NEEDED = "needed"
    """The guest runs elsewhere, and part of its disk is here only. Nothing may be written to it."""
    OUT_OF_DATE = "out of date"
    """The guest has all of its disk elsewhere."""
    COMMITTING = "committing"
    """What the guest wrote elsewhere is being written into it: it is neither the old disk nor the new one,
    until that has come to its end."""


@dataclass(frozen=True)
class Marker:
    """What is known of an image whose guest has moved.

    image      the path by which its guest had it on this host
    moved      where it is since, or "" where it keeps its name, as a block device does
    migration  the name of the migration
    to         where the disk went, for people: HOST:PATH
    time       when, in seconds since the epoch
    """

    image: str
    moved: str
    migration: str
    to: str
    time: float
    standing: Standing = Standing.NEEDED

    @property
    def place(self) -> Path:
        """Return where the image is."""
        return Path(self.moved or self.image)

    @property
    def since(self) -> str:
        """Return when the guest went, for people, in the time of this host."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))

    @property
    def lifting(self) -> str:
        """Return the words of the command that makes it an image like others again."""
        return f"nbd-migrate fence --lift {shlex.quote(self.image)}"

    def to_json(self) -> str:
        """Return the marker as text, which people read, too."""
        values = {"version": VERSION, **asdict(self), "standing": self.standing.value}
        told = {"since": self.since, "to use the image all the same": self.lifting}
        return json.dumps(values | told, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the marker of such a text; ValueError for what no version of ours has written."""
        try:
            values = json.loads(text)
            if values["version"] != VERSION:
                raise ValueError(f"it is of version {values['version']}, and {VERSION} is known here")
            image, moved, migration, to = words = [values[key] for key in _WORDS]
            if not all(isinstance(word, str) for word in words) or not image.startswith("/"):
                raise ValueError("it names no image")
            return cls(image, moved, migration, to, float(values["time"]), Standing(values["standing"]))
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"it lacks {error}" if isinstance(error, KeyError) else str(error)) from error


def marker_beside(image: Path) -> Path:
    """Return where the marker of a file would be, of an image in its place or of one that was moved."""
    # Not with_name(): a path may be without one, and is refused by whoever opens it.
    return image.parent / f"{image.name.removesuffix(MOVED)}{MARKER}"


def find_marker(image: Path) -> Path | None:
    """Return the marker that speaks of this image, by whatever path that is named; None: it has none."""
    device = _device_number(image)
    if device is not None:
        return next((path for path, named in _markers_of_devices() if _device_number(named) == device), None)
    # What was moved has left a link behind that leads nowhere.
    names = (image, Path(os.path.realpath(image)))
    return next((found for found in map(marker_beside, names) if os.path.lexists(found)), None)


def read_marker(path: Path) -> Marker:
    """Read a marker. Raises ImageError where there is another thing in its place."""
    try:
        return Marker.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(
            f"{path}: the marker of an image whose guest has moved cannot be read: {reason}; if it is "
            "another's file, give it another name"
        ) from error


def refuse_moved(image: Path) -> None:
    """Raise ImageError for an image whose guest has moved to another host, saying where it is.

    Where what the guest wrote there is being written to the image, that is done at its new place.
    """
    found = find_marker(image)
    if found is None:
        return
    marker = read_marker(found)
    if marker.standing is not Standing.COMMITTING or not _is_at(image, marker.place):
        raise ImageError(refusal(image, marker, found))


def refusal(image: Path, marker: Marker, place: Path) -> str:
    """Return the line that says why an image is not used; ``place`` is where its marker is."""
    where = f"; the image is {marker.moved} now" if marker.moved and str(image) != marker.moved else ""
    went = f"{image}: its guest went to {marker.to} on {marker.since} (migration {marker.migration}){where}"
    if marker.standing is Standing.COMMITTING:
        return (
            f"{went}; what it wrote there is being written to it, and it is no disk until that has ended: "
            f"nbd-migrate recover {marker.migration} --on a"
        )
    if marker.standing is Standing.NEEDED:
        need = "its disk there still needs this image, as it is"
    else:
        gone = " ".join(shlex.quote(str(each)) for each in (*([marker.moved] if marker.moved else []), place))
        need = f"this image is out of date; where nobody needs it: rm {gone}"
    return f"{went}; {need}; to use it all the same, without what was written since: {marker.lifting}"


def _is_at(image: Path, place: Path) -> bool:
    try:
        return image.samefile(place)
    except OSError:
        return False


def _device_number(path: Path) -> int | None:
    """Return the number of a block device; None for all else, and for what is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else None


def _markers_of_devices() -> Iterator[tuple[Path, Path]]:
    """Yield the markers of block devices, each with the path of its device."""
    for base in state_directories():
        for path in sorted(base.glob(f"*/*{MARKER}")):
            yield path, Path(read_marker(path).image)


def state_directories() -> list[Path]:
    """Return where this user's, and root's, markers of block devices are."""
    own = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return [Path(base, "nbd-migrate") for base in dict.fromkeys(["/var/lib", own])]


def write_marker(path: Path, marker: Marker) -> None:
    """Write a marker, or another in its place, durably and as a whole. Raises OSError."""
    # Whoever may see the image may see why it is not to be used.
    fresh = path.with_name(f"{path.name}.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(marker.to_json())
        file.flush()
        os.fsync(descriptor)
    fresh.replace(path)
    _sync_directory(path.parent)


def remove_marker(path: Path) -> None:
    """Remove a marker, durably; it may be gone already. Raises OSError."""
    path.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
