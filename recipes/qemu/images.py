"""What a QEMU, or qemu-img, says of an image and of what is below it. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

RAW, QCOW2 = "raw", "qcow2"
FORMATS = (RAW, QCOW2)
"""Formats of disks that move."""

_PLAIN = {"driver", "file", "backing", "encrypt.key-secret", "data-file"}
"""What may be named of an image that is its whole file; of the last two fault_in() tells."""


@dataclass(frozen=True)
class Layer:
    """One image of a chain: its file, as it was named, and its format."""

    file: str
    format: str


def file_of(name: str) -> str:
    """Return the file of an image as QEMU names it; what is no file as it is.

    QEMU says ``json:`` where an image was given more than its file, as the node below it by its name, or the
    size of a disk that is on a larger block device.
    """
    if not name.startswith("json:"):
        return name
    try:
        options = json.loads(name.removeprefix("json:"))
    except ValueError:
        return name
    protocol = options.get("file")
    if not isinstance(protocol, dict) or protocol.get("driver") not in ("file", "host_device"):
        return name
    # Only of a device is no more served than the disk.
    more = {"size"} if protocol["driver"] == "host_device" else set()
    if not options.keys() <= _PLAIN | more or not protocol.keys() <= {"driver", "filename"}:
        return name
    return str(protocol.get("filename", name))


def chain_of(info: Mapping[str, Any]) -> list[Layer]:
    """Return the images that a QEMU has open, the active one first, as it tells of the uppermost node."""
    return listed_chain(images_in(info))


def listed_chain(infos: Iterable[Mapping[str, Any]]) -> list[Layer]:
    """Return the same as the files have it: what ``qemu-img info --backing-chain`` tells."""
    return [Layer(file_of(each["filename"]), each["format"]) for each in infos]


def images_in(info: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what is told of each image of a chain that a QEMU has open."""
    below: Mapping[str, Any] | None = info
    while below is not None:
        yield below
        below = below.get("backing-image")


def fault_in(info: Mapping[str, Any]) -> str:
    """Say why an image, or one below it, cannot be read from its file alone; nothing if it can."""
    for image in images_in(info):
        file, details = file_of(image["filename"]), image.get("format-specific", {}).get("data", {})
        # Without its options: a name may be as long as all that was given.
        file = "it" if file.startswith("json:") else file
        if image.get("encrypted") or "encrypt" in details or image["format"] == "luks":
            return f"{file} is encrypted, and its key is known to A's QEMU alone"
        if "data-file" in details:
            return f"{file} has its data in another file ({details['data-file']})"
        if details.get("corrupt"):
            return f"{file} is marked as corrupt (qemu-img check -r)"
    return ""


def snapshots_in(info: Mapping[str, Any]) -> list[str]:
    """Return the names of the snapshots inside of an image."""
    return [str(each["name"]) for each in info.get("snapshots", ())]
