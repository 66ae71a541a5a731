"""The guest's drives: which option of the command line each comes from, and which of them move. Pure."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from recipes.discovery.command_line.arguments import Arguments
from recipes.discovery.command_line.options import CommandLine, Option
from recipes.discovery.guest import Drive, Guest
from recipes.hosts.quoting import pasted
from recipes.plans.disks import shortest
from recipes.qemu.images import FORMATS

DISKS = ("hda", "hdb", "hdc", "hdd", "cdrom")
"""Options that are a drive and its device in one."""

NOT_UNDERSTOOD = ("fda", "fdb", "mtdblock", "sd", "iscsi")

BUILT_IN = ("ide-hd", "ide-cd", "virtio-blk-pci", "scsi-hd", "scsi-cd")
"""Devices that QEMU makes by itself of a ``-drive``, and for which a ``-device`` can be written instead."""

FIRMWARE = "cfi.pflash"
"""How the types of flash chips begin."""


@dataclass(frozen=True)
class Matched:
    """A drive of the guest, and the ``-device`` that made it; None where QEMU did so by itself."""

    drive: Drive
    device: Option | None


def match(command: CommandLine, guest: Guest) -> Iterator[Matched]:
    """Yield each of the guest's drives with its ``-device``."""
    devices = list(command.named("device"))
    # JSON comes after all others, and after what QEMU makes of -drive.
    nameless = [each for each in devices if not each.arguments.text("id")]
    in_order = [each for each in nameless if not each.arguments.is_json]
    left = list(devices)
    for drive in guest.drives:
        found = _by_name(left, drive) or _by_drive(left, drive)
        if found is None and 0 <= drive.anonymous < len(in_order):
            # Its medium may have changed since.
            candidate = in_order[drive.anonymous]
            if candidate in left and drive.type.startswith(candidate.arguments.text("driver")):
                found = candidate
        if found is None and drive.anonymous >= 0:
            json = [each for each in nameless if each.arguments.is_json]
            at = drive.anonymous - len(guest.anonymous) + len(json)
            if 0 <= at < len(json) and json[at] in left:
                found = json[at]
        if found is not None:
            left.remove(found)
        yield Matched(drive, found)


def _by_name(devices: Sequence[Option], drive: Drive) -> Option | None:
    found = (each for each in devices if drive.id and each.arguments.text("id") == drive.id)
    return next(found, None)


def _by_drive(devices: Sequence[Option], drive: Drive) -> Option | None:
    names = {drive.backend, drive.node.name if drive.node else ""} - {""}
    return next((each for each in devices if each.arguments.text("drive") in names), None)


def complaint(drive: Drive, image: str, address: str) -> str:
    """Say why the medium of a drive cannot move; nothing if it can.

    ``image`` is its file's absolute path, ``address`` that of the monitor.
    """
    node = drive.node
    assert node is not None
    what = f"the disk {name_of(drive)} ({node.file})"
    if drive.removable and not node.read_only:
        which = json.dumps({"id": drive.id} if drive.id else {"device": drive.backend})
        eject = pasted(["nbd-migrate", "qmp", address, "eject", which])
        return (
            f"the drive {name_of(drive)} has {node.file} in it, and media do not move; take it out: {eject}"
        )
    if node.driver not in FORMATS:
        return f"{what} is {node.driver}, and only {' and '.join(FORMATS)} disks can move"
    if node.fault:
        return f"{what} cannot move: {node.fault}"
    if node.limited:
        return f"{what} is throttled ({node.limited}); take that away with block_set_io_throttle"
    if node.read_only and image.startswith("/dev/"):
        return f"{what} is a device of A's host, and read-only; take it away"
    if image.startswith("/dev/fdset/"):
        return f"{what} was passed to QEMU as a file descriptor, and has no name"
    if not image.startswith("/"):
        return f"{what} is no file or block device of its own on A"
    if not drive.waits and not node.read_only:
        return f"{what} is in a {drive.type}, which cannot wait; virtio-blk, scsi-hd and ide-hd can"
    return ""


def path_of(file: str, directory: str) -> str:
    """Return the absolute path of a file; what is no path as it is."""
    if file.startswith("/"):
        return shortest(file)
    if file.startswith("json:") or ":" in file.partition("/")[0]:
        return file
    return posixpath.normpath(posixpath.join(directory, file))


def name_of(drive: Drive) -> str:
    """Return what messages call a drive."""
    return drive.id or drive.backend or (drive.node.name if drive.node else drive.path)


def made_by_itself(drive: Drive) -> Arguments | None:
    """Return the ``-device`` for what QEMU has made by itself, at the place where it is; None for others."""
    if drive.type not in BUILT_IN:
        return None
    values = {"driver": drive.type, "bus": drive.bus}
    for name, place in drive.address:
        values[name] = _slot(place) if name == "addr" else str(place)
    return Arguments(values, "driver")


def _slot(devfn: int) -> str:
    """Return a place on a PCI bus as QEMU's options have it."""
    return f"0x{devfn >> 3:x}" + (f".{devfn & 7}" if devfn & 7 else "")


def referenced(option: Option) -> Iterator[str]:
    """Yield what may be the names of other block nodes in a ``-blockdev``."""
    for key, value in option.arguments.values.items():
        if key != "node-name" and not key.endswith((".node-name", "driver", "filename")):
            yield str(value)


def belonging(names: set[str], nodes: dict[str, Option]) -> set[str]:
    """Return these block nodes and all that are below them, as far as the command line has them."""
    found: set[str] = set()
    ahead = [name for name in names if name in nodes]
    while ahead:
        name = ahead.pop()
        found.add(name)
        ahead += [each for each in referenced(nodes[name]) if each in nodes and each not in found]
    return found
