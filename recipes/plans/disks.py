"""One disk that moves, as it is planned: what is checked of it, and what lies beside it on B."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nbdserve.common.errors import UsageError
from nbdserve.common.socket_paths import SOCKET_PATH_LIMIT
from nbdserve.exports.moved_images import MOVED
from overlay.formats.device.map_place import is_among_devices, name_of
from recipes.qemu.images import FORMATS, RAW

OF_DRIVE = ("export", "backing", "overlay", "access", "local", "socket")
"""What block nodes of B's QEMU are called beside a drive: DRIVE-export, and so on."""

CACHE = ("direct", "no-flush")
"""What QEMU may be told of a file: to go past the page cache, and to flush nothing."""

AIO = ("threads", "native", "io_uring")

DETECT_ZEROES = ("off", "on", "unmap")

SHORTHAND = {
    "image": "source.image",
    "node": "source.node",
    "target": "destination.image",
    "drive": "destination.node",
    "seed": "destination.seed",
}
"""The keys of a plan's only disk where it has no [[disk]]."""


def away(image: str) -> str:
    """Return where A's image goes when its guest has left; nothing for a block device, which stays."""
    return "" if is_among_devices(image) else f"{image}{MOVED}"


@dataclass(frozen=True)
class PlannedDisk:
    """A disk of the guest.

    image   on A: a file or a block device
    target  on B: where it ends, a file or, below /dev, a block device
    drive   the block node of B's QEMU that the -device there refers to
    node    A's block node or device; empty: found by the image's name
    format  of the image on A; on B the disk is raw in any case
    seed    on B: a raw copy of the disk, an older one perhaps; what is the same in it is not sent
    state   on B: the directory for what belongs to a target that is a block device; empty: see ``places.py``

    How B's QEMU uses it, in QEMU's words; with nbd-overlay, the first two from the pivot on:

    cache, aio     how it opens the target, if it can
    detect_zeroes  what becomes of zeros that the guest writes
    """

    image: str
    target: str
    drive: str
    node: str = ""
    format: str = RAW
    seed: str = ""
    state: str = ""
    cache: tuple[str, ...] = ()
    aio: str = ""
    detect_zeroes: str = ""

    @property
    def on_device(self) -> bool:
        """Tell whether it ends on a block device, beside which nothing is made."""
        return is_among_devices(self.target)

    @property
    def stem(self) -> str:
        """Return the path to which a suffix is added for what belongs to the target."""
        if not self.on_device:
            return self.target
        return posixpath.join(self.state or state_of(self.target), posixpath.basename(self.target))

    @property
    def directory(self) -> str:
        """Return the directory for what belongs to the target."""
        return posixpath.dirname(self.stem)

    @property
    def map(self) -> str:
        """Return where nbd-overlay keeps what is local already."""
        return f"{self.stem}.map"

    @property
    def overlay_socket(self) -> str:
        """Return where nbd-overlay serves the disk to B's QEMU."""
        return f"{self.stem}.nbd"

    @property
    def overlay_monitor(self) -> str:
        """Return nbd-overlay's own QMP socket."""
        return f"{self.stem}.qmp"

    def file_node(self) -> dict[str, object]:
        """Return the block node of B's QEMU for the target itself."""
        return {"driver": "host_device" if self.on_device else "file", "filename": self.target}

    @property
    def opening(self) -> dict[str, object]:
        """Return what is added to that for how it is opened; nothing as by default."""
        cache = {"cache": {key: key in self.cache for key in CACHE}} if self.cache else {}
        return {**cache, **({"aio": self.aio} if self.aio else {})}

    @property
    def guests(self) -> dict[str, object]:
        """Return what is added to the guest's raw node on the target, or on what serves it."""
        return {"detect-zeroes": self.detect_zeroes} if self.detect_zeroes else {}

    @property
    def beside(self) -> tuple[str, ...]:
        """Return the target, and each path that nbd-overlay uses beside it."""
        return (self.target, self.map, self.overlay_socket, self.overlay_monitor)

    def check(self, keys: dict[str, str], *, sockets: bool) -> None:
        """Raise UsageError if a value cannot be right; ``keys`` are what the operator calls them."""
        for key, path in (("image", self.image), ("target", self.target)):
            if not path:
                raise UsageError(f"{keys[key]}: this is missing")
        if sockets and len(os.fsencode(self.overlay_monitor)) > SOCKET_PATH_LIMIT:
            raise UsageError(
                f"{keys['target']}: {self.target!r} is too long for the sockets beside it; choose one "
                f"with which {self.overlay_monitor!r} has at most {SOCKET_PATH_LIMIT} bytes"
            )
        check_path(keys["image"], self.image)
        check_path(keys["target"], self.target)
        if self.format not in FORMATS:
            raise UsageError(f"disk.format: {self.format!r} is neither {' nor '.join(FORMATS)}")
        if self.seed:
            check_path(keys["seed"], self.seed)
            if self.seed in self.beside:
                raise UsageError(f"{keys['seed']}: {self.seed!r} is what is made there; name another copy")
        if self.state and not self.on_device:
            raise UsageError(
                "disk.state: this is for a target that is a block device, named by its path below /dev; "
                "leave it out"
            )
        if self.state:
            check_path("disk.state", self.state, directory=True)
            if is_among_devices(self.state):
                raise UsageError(
                    f"disk.state: {self.state!r} is among the devices; name a directory in a file system"
                )
        self._check_opening()
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]{0,19}", self.drive):
            raise UsageError(
                f"{keys['drive']}: {self.drive!r} is not usable: up to 20 letters, digits and ._- that begin "
                "with a letter, as in the -device of the disk"
            )

    def _check_opening(self) -> None:
        """Raise UsageError for what QEMU would not take."""
        words: list[tuple[str, str, Sequence[str]]] = [("cache", each, CACHE) for each in self.cache]
        words += [("aio", self.aio, AIO), ("detect_zeroes", self.detect_zeroes, DETECT_ZEROES)]
        for key, word, known in words:
            if word and word not in known:
                raise UsageError(f"disk.{key}: {word!r} is neither {' nor '.join(known)}")
        if self.aio == "native" and "direct" not in self.cache:
            raise UsageError('disk.aio: native needs cache = ["direct"], as QEMU has it')


def check_together(disks: Sequence[PlannedDisk]) -> None:
    """Raise UsageError where two disks are one, or would be in each other's way."""
    for key in ("image", "target", "drive", "node"):
        values = [getattr(disk, key) for disk in disks if getattr(disk, key)]
        twice = next((value for n, value in enumerate(values) if value in values[:n]), None)
        if twice is not None:
            raise UsageError(f"disk.{key}: {twice} is that of two disks")
    taken: dict[str, PlannedDisk] = {}
    for disk in disks:
        for path in disk.beside[1:]:
            if path in taken:
                raise UsageError(f"disk.state: {path} would be of {taken[path].target} and {disk.target}")
            taken[path] = disk
    for disk in disks:
        if disk.target in taken:
            other = taken[disk.target].target
            raise UsageError(f"disk.target: {disk.target} is where nbd-overlay has a file of {other}")
    nodes = {f"{disk.drive}-{suffix}": disk for disk in disks for suffix in OF_DRIVE}
    for disk in disks:
        if disk.drive in nodes:
            raise UsageError(
                f"disk.drive: {disk.drive} is what a node beside {nodes[disk.drive].drive} is called; "
                "choose another"
            )


def state_of(device: str) -> str:
    """Return the directory on B for what belongs to a block device, as root's commands keep it."""
    return posixpath.join("/var/lib/nbd-migrate", name_of(device))


def stem_of(target: str) -> str:
    """Return the path to which a suffix is added for what belongs to a target; see PlannedDisk.stem."""
    return PlannedDisk("", target, "").stem


def shortest(path: str) -> str:
    """Return an absolute path without ``.``, ``..`` and double slashes.

    >>> shortest("//dev/./vg/../sda")
    '/dev/sda'
    """
    return posixpath.normpath(f"/{path.lstrip('/')}")


def check_path(where: str, path: str, *, directory: bool = False) -> None:
    """Raise UsageError unless the path is absolute and written in the shortest way.

    What a path is, a device or the file of something else, is told by its letters. A directory's may end
    with a slash.
    """
    if not path.startswith("/"):
        raise UsageError(f"{where}: {path!r} must be an absolute path")
    wanted = shortest(path)
    if path not in (wanted, f"{wanted}/" if directory else wanted):
        raise UsageError(f"{where}: {path!r} has parts that it does not need: write {wanted}")
