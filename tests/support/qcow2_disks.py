"""A guest with disks in qcow2 images, with and without others below them, and one in a raw file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from tests.support.disks import MIB, random_bytes
from tests.support.many_disks import ManyDisks
from tests.support.processes import check
from tests.support.vms import QEMU

SIZES = (16 * MIB, 4 * MIB, 8 * MIB)


def over_another(image: Path, content: bytes) -> None:
    """Make a qcow2 image of which a third is in itself, and a third each in the two below it.

    Whoever reads only one of them, or takes the wrong one for the lower, reads what never was on the disk.
    """
    size = len(content)
    third, rest = size // 3 // MIB * MIB, size - 2 * (size // 3 // MIB * MIB)
    base, middle = image.with_suffix(".base.raw"), image.with_suffix(".middle.qcow2")
    base.write_bytes(random_bytes(2 * third, seed=77) + content[2 * third :])
    check("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base.name, middle)
    check("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", middle.name, image)
    assert rest > 0
    for layer, at, begin in ((middle, 0, b"old"), (middle, third, b""), (image, 0, b"")):
        part = image.with_suffix(".part")
        part.write_bytes((begin + content[at : at + third])[:third])
        check("qemu-io", "-f", "qcow2", "-c", f"write -s {part} {at} {third}", layer)
        part.unlink()


class Qcow2Disks(ManyDisks):
    """The first disk is qcow2 over two others, the second raw, the third qcow2 alone."""

    def __init__(self, directory: Path, engine: str = "overlay", sizes: Sequence[int] = SIZES) -> None:
        super().__init__(directory, engine, sizes)
        for number, disk in list(enumerate(self.disks)):
            if number == 1:
                continue
            image = disk.image.with_suffix(".qcow2")
            if number == 0:
                over_another(image, disk.original)
            else:
                check("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk.image, image)
            disk.image.unlink()
            moved = disk.moved.with_suffix(".qcow2")
            self.disks[number] = dataclasses.replace(disk, image=image, moved=moved)
            self.change_disk(number, image=str(image), format="qcow2")

    def source_qemu(self) -> list[str]:
        """A's command line."""
        blocks = [
            {
                "driver": disk.image.suffix[1:],
                "node-name": disk.drive,
                "file": {"driver": "file", "filename": str(disk.image)},
            }
            for disk in self.disks
        ]
        return [
            *QEMU,
            *self.devices(),
            *("-serial", f"file:{self.directory / 'a.serial'}"),
            *(word for block in blocks for word in ("-blockdev", json.dumps(block))),
            *("-qmp", f"unix:{self.monitor_a},server=on,wait=off"),
            *("-qmp", f"unix:{self.second_a},server=on,wait=off"),
        ]

    @property
    def second_a(self) -> Path:
        """A second monitor of A's QEMU: one serves one client at a time."""
        return self.directory / "second.qmp"

    def content(self, image: Path) -> bytes:
        """What a disk of A holds; the images below it stay where they are."""
        copy = self.directory / "content.raw"
        if ".raw" in image.suffixes:
            return image.read_bytes()
        if image.name.startswith("a0."):
            below = self.directory / "a0.middle.qcow2"
            options = f"driver=qcow2,file.filename={image},backing.driver=qcow2,backing.file.filename={below}"
            check("qemu-img", "convert", "--image-opts", "-O", "raw", options, copy)
        else:
            check("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, copy)
        found = copy.read_bytes()
        copy.unlink()
        return found
