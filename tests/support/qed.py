"""QED images for tests: made in a line, looked at through QEMU, and damaged on purpose."""

from __future__ import annotations

import struct
from pathlib import Path

from overlay.formats.image import Backing
from overlay.formats.qed.create import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, create, new_header
from overlay.formats.qed.header import Header
from tests.support.processes import check


def make_image(
    path: Path,
    size: int,
    *,
    backing: str | None = None,
    cluster_size: int = DEFAULT_CLUSTER_SIZE,
    table_size: int = DEFAULT_TABLE_SIZE,
) -> Header:
    """Make an empty image with our own code. Sizes are in bytes, the table's in clusters."""
    named = None if backing is None else Backing(backing, raw=True)
    header = new_header(size, named, cluster_size, table_size)
    create(path, header, named)
    return header


def qemu_io(image: Path, *commands: str, options: tuple[str, ...] = ()) -> str:
    """Run qemu-io's commands on a QED image; they must succeed."""
    arguments = [word for command in commands for word in ("-c", command)]
    output = check("qemu-io", "-f", "qed", *options, *arguments, image)
    assert "failed" not in output, output
    return output


def read_u64(path: Path, offset: int) -> int:
    """A table entry at an offset of the file."""
    with path.open("rb") as image:
        image.seek(offset)
        value: int = struct.unpack("<Q", image.read(8))[0]
        return value


def poke(path: Path, offset: int, value: int, layout: str = "<Q") -> None:
    """Overwrite an integer in the file."""
    with path.open("r+b") as image:
        image.seek(offset)
        image.write(struct.pack(layout, value))
