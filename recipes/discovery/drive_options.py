"""What becomes of the options that make the guest's drives, when B's are made by the migration. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from recipes.discovery.command_line.arguments import Arguments
from recipes.discovery.command_line.options import CommandLine, Option
from recipes.discovery.drives import (
    DISKS,
    FIRMWARE,
    Matched,
    belonging,
    complaint,
    made_by_itself,
    match,
    name_of,
    path_of,
)
from recipes.discovery.guest import Drive, Guest, Node
from recipes.plans.disks import CACHE
from recipes.qemu.images import RAW

NODE = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,19}")
"""What a disk may be called in a plan."""

Target = Callable[[str, str], str]
"""Tells of a file of A's, and of its format, what it is called on B."""

EMPTY = "an empty drive, as A has it"
MADE_BY_ITSELF = "the device that A's QEMU has made by itself"


@dataclass(frozen=True)
class Line:
    """An option of B's QEMU, and what there is to say of it."""

    option: Option
    note: str = ""


@dataclass(frozen=True)
class FoundDisk:
    """A disk of the guest that moves.

    image   its file on A, an absolute path
    node    its block node in A's QEMU
    drive   what its device on B refers to
    size    in bytes
    device  the type of its device
    format  of its image
    cache, aio, detect_zeroes  as in a plan; empty where it is QEMU's default
    """

    image: str
    node: str
    drive: str
    size: int
    device: str
    format: str = RAW
    cache: tuple[str, ...] = ()
    aio: str = ""
    detect_zeroes: str = ""


@dataclass(frozen=True)
class FoundFlash:
    """A flash chip that the guest writes to: its file on A and on B, and its size in bytes."""

    image: str
    target: str
    size: int


class DriveOptions:
    """Which options stay, go, or become others.

    dropped   go
    replaced  become others
    added     come at the end
    disks     what moves
    flash     chips that the guest writes to
    same      files that B has to have as A has them
    notes     what is left out that is no disk of the guest
    refused   why a drive cannot move
    """

    def __init__(
        self, command: CommandLine, guest: Guest, directory: str, address: str, target: Target
    ) -> None:
        """``directory`` is that of the process, and ``address`` that of its monitor."""
        self._target = target
        self._command = command
        self._guest = guest
        self._directory = directory
        self._address = address
        self.dropped: set[Option] = set()
        self.replaced: dict[Option, Line] = {}
        self.added: list[Line] = []
        self.disks: list[FoundDisk] = []
        self.flash: list[FoundFlash] = []
        self.same: list[str] = []
        self.notes: list[str] = []
        self.refused: list[str] = []
        for each in match(command, guest):
            self._decide(each)
        self._refuse_twice()
        self._drop_implicit()
        self._drop_nodes()

    def _decide(self, each: Matched) -> None:
        drive = each.drive
        if drive.type.startswith(FIRMWARE):
            if drive.node and not drive.node.read_only:
                self._flash(drive, drive.node)
        elif drive.node is None:
            self._empty(each)
        elif not drive.path:
            self.notes.append(f"the drive {name_of(drive)} ({drive.node.file}), which no device uses")
            self._drop(drive.backend)
        else:
            self._disk(each)

    def _flash(self, drive: Drive, node: Node) -> None:
        """What the guest writes to a flash chip comes with it, into another file."""
        image = path_of(node.file, self._directory)
        option = next((each for each in self._command.options if self._is_file_of(each, node, image)), None)
        if option is None or not image.startswith("/") or image.startswith("/dev/"):
            what = f"{name_of(drive)} ({node.file})"
            self.refused.append(f"the flash chip {what} is in no file that the command line names")
            return
        target = self._target(image, node.driver)
        self.flash.append(FoundFlash(image, target, node.size))
        if option.name == "pflash":
            words = Arguments({"if": "pflash", "format": RAW, "file": target})
            self.replaced[option] = Line(Option("drive", str(words)), f"A's is {option}")
            return
        if option.name == "drive":
            changed = option.arguments.without("file", "format").having(format=RAW, file=target)
        else:
            changed = option.arguments.without("file", "driver", "backing").having(driver=RAW)
            below = option.arguments.text("file")
            self.dropped.update(
                each for each in self._command.named("blockdev") if each.arguments.text("node-name") == below
            )
            changed = Arguments(
                {**changed.values, "file.driver": "file", "file.filename": target},
                changed.implied,
                changed.is_json,
            )
        self.replaced[option] = Line(option.having(changed), f"A's file is {image}")

    def _is_file_of(self, option: Option, node: Node, image: str) -> bool:
        """Tell whether this is the option of a flash chip in which this is."""
        if option.name == "pflash":
            return path_of(option.value or "", self._directory) == image
        if option.name == "drive" and option.arguments.text("if") == "pflash":
            named = option.arguments.text("file") or option.arguments.text("file.filename")
            return path_of(named, self._directory) == image
        return option.name == "blockdev" and option.arguments.text("node-name") == node.name

    def _empty(self, each: Matched) -> None:
        """A drive without a medium stays one, whatever was in it at the start."""
        drive, device = each.drive, each.device
        if device is None:
            floppies = list(self._command.named("fda", "fdb"))
            if made := made_by_itself(drive):
                self.added.append(Line(Option("device", str(made)), EMPTY))
            elif drive.type == "floppy" and floppies:
                self.added.append(
                    Line(Option("drive", f"if=floppy,index={dict(drive.address)['unit']}"), EMPTY)
                )
                self.dropped.update(floppies)
            return
        option = self._drive_of(device.arguments.text("drive"))
        if option is None:
            self.replaced[device] = Line(device.having(device.arguments.without("drive")), EMPTY)
        elif "file" in option.arguments.values:
            kept = {
                k: v for k, v in option.arguments.values.items() if k in ("if", "id", "media", "readonly")
            }
            self.replaced[option] = Line(Option("drive", str(Arguments(kept))), EMPTY)

    def _disk(self, each: Matched) -> None:
        """A disk moves, or is refused."""
        drive, node = each.drive, each.drive.node
        assert node is not None
        image = path_of(node.file, self._directory)
        if fault := complaint(drive, image, self._address):
            self.refused.append(fault)
            return
        if node.read_only:
            self._stay(each, image)
            return
        given = self._device_of(each, "disk")
        if given is None:
            return
        name = self._name([given.text("drive"), drive.backend, node.name])
        cache, aio = self._opening(drive, node, image)
        zeroes = node.detect_zeroes.removeprefix("off")
        found = FoundDisk(image, node.name, name, node.size, drive.type, node.driver, cache, aio, zeroes)
        self.disks.append(found)
        made = given.having(drive=name, rerror="stop", werror="stop")
        if self._writes_through(drive, image):
            made = made.having(write_cache="off")
        if each.device:
            self.replaced[each.device] = Line(each.device.having(made))
        else:
            self.added.append(Line(Option("device", str(made)), MADE_BY_ITSELF))
        for used in (drive.backend, given.text("drive")):
            self._drop(used)

    def _stay(self, each: Matched, image: str) -> None:
        """What the guest cannot write to is on B, too: its drive has the same in it, under the same name."""
        drive, node = each.drive, each.drive.node
        assert node is not None
        if each.device and each.device.arguments.text("drive") in {node.name} & self._nodes():
            self._keep(node, image)
            return
        option = self._drive_of(drive.backend)
        if each.device and option:
            changed = option.arguments.without("file", "format").having(file=image, format=node.driver)
            if changed.text("media") != "cdrom":
                changed = changed.having(readonly="on")
            self.replaced[option] = Line(option.having(changed))
            self._keep(node, image)
            return
        given = self._device_of(each, "drive")
        if given is None:
            return
        name = drive.backend or f"medium{len(self.same)}"
        media = {"media": "cdrom"} if drive.type.endswith("-cd") else {}
        values = {"if": "none", "id": name, **media, "readonly": "on", "format": node.driver, "file": image}
        self.added.append(Line(Option("drive", str(Arguments(values)))))
        made = given.having(drive=name)
        if each.device:
            self.replaced[each.device] = Line(each.device.having(made), "what is in the drive now")
        else:
            self.added.append(Line(Option("device", str(made)), MADE_BY_ITSELF))
        self._keep(node, image)

    def _device_of(self, each: Matched, what: str) -> Arguments | None:
        """Return the arguments of the device, as QEMU made it or was told to; None where that is refused."""
        drive = each.drive
        given = each.device.arguments if each.device else made_by_itself(drive)
        if given is None:
            self.refused.append(f"the {what} {name_of(drive)} is in a {drive.type} that no -device has made")
        return given

    def _keep(self, node: Node, image: str) -> None:
        self.same += [image, *(path_of(each, self._directory) for each in node.below)]

    def _nodes(self) -> set[str]:
        """Return the names of the block nodes of the command line."""
        return {each.arguments.text("node-name") for each in self._command.named("blockdev")}

    def _name(self, wanted: list[str]) -> str:
        """Return what a disk is called on B: as on A, if a plan may have that."""
        chosen = {disk.drive for disk in self.disks}
        usable = (name for name in wanted if NODE.fullmatch(name) and name not in chosen)
        taken = chosen | set(self._names())
        return next(usable, "") or next(
            name for number in range(1000) if (name := f"disk{number}") not in taken
        )

    def _names(self) -> Iterator[str]:
        """Yield what is called something already."""
        yield from (drive.backend for drive in self._guest.drives)
        for option in self._command.named("drive", "blockdev"):
            yield from (option.arguments.text(key) for key in ("id", "node-name"))

    def _writes_through(self, drive: Drive, image: str) -> bool:
        """Tell whether A's QEMU was told to make each write durable, which the guest knows."""
        option = self._drive_with(drive, image)
        return option is not None and option.arguments.text("cache") in ("writethrough", "directsync")

    def _opening(self, drive: Drive, node: Node, image: str) -> tuple[tuple[str, ...], str]:
        """Return the cache and the aio with which A's QEMU has a disk's file open.

        Of its monitor only the guest's node tells, and nothing of aio.
        """
        nodes = {each.arguments.text("node-name"): each.arguments for each in self._command.named("blockdev")}
        option = self._drive_with(drive, image)
        said = [option.arguments] if option else []
        if own := nodes.get(node.name):
            below = nodes.get(own.text("file"))
            said += [own, below] if below else [own]
        cache = tuple(
            key
            for key in CACHE
            if key in node.cache
            or any(each.is_on(f"{of}cache.{key}") for each in said for of in ("", "file."))
        )
        aio = next((word for each in said for of in ("", "file.") if (word := each.text(f"{of}aio"))), "")
        return cache, aio.removeprefix("threads")

    def _drive_with(self, drive: Drive, image: str) -> Option | None:
        """Return the ``-drive`` that has made a drive, by its name or its file."""

        def is_its(option: Option) -> bool:
            file = option.arguments.text("file")
            return bool(file) and posixpath.normpath(posixpath.join(self._directory, file)) == image

        return self._drive_of(drive.backend) or next(filter(is_its, self._command.named("drive")), None)

    def _drive_of(self, name: str) -> Option | None:
        """Return the ``-drive`` of this name."""
        named = (each for each in self._command.named("drive") if each.arguments.text("id") == name)
        return next(named, None) if name else None

    def _drop(self, name: str) -> None:
        """Leave out the ``-drive`` of this name."""
        if option := self._drive_of(name):
            self.dropped.add(option)

    def _refuse_twice(self) -> None:
        images = [disk.image for disk in self.disks]
        twice = sorted({image for image in images if images.count(image) > 1})
        self.refused += [f"{image} is two of its disks" for image in twice]

    def _drop_implicit(self) -> None:
        """Leave out what QEMU would make a device of, as there is a ``-device`` now."""
        self.dropped.update(self._command.named(*DISKS))
        for option in self._command.named("drive"):
            if option.arguments.text("if") not in ("none", "pflash", "floppy"):
                self.dropped.add(option)

    def _drop_nodes(self) -> None:
        """Leave out block nodes that nothing on B uses: those of the disks that move, and idle ones."""
        nodes = {each.arguments.text("node-name"): each for each in self._command.named("blockdev")}
        devices = list(self._command.named("device", "machine"))
        used = set[str]()
        for option in devices:
            kept = self.replaced[option].option if option in self.replaced else option
            used |= {kept.arguments.text(key) for key in ("drive", "pflash0", "pflash1")}
        used -= {disk.drive for disk in self.disks}
        gone = set(nodes) - belonging(used, nodes)
        self.dropped |= {nodes[name] for name in gone}
        of_disks = belonging({each.arguments.text("drive") for each in devices}, nodes)
        self.notes += [f"the block node {name}, which no device uses" for name in sorted(gone - of_disks)]
