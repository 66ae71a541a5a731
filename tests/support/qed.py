"""QED images for tests: made in a line, looked at through QEMU, and damaged on purpose."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from overlay.image import Backing
from overlay.qed.create import DEFAULT_CLUSTER_SIZE, DEFAULT_TABLE_SIZE, create, new_header
from overlay.qed.header import Header
from tests.support.processes import check

SECTOR = 512


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


@dataclass
class SimulatedDisk:
    """A Storage in memory that knows what would be left of it after a power cut.

    ``content`` is what the program sees, ``durable`` what the last sync made safe, ``pending`` what came
    since: (offset, data) for a write, (size, None) for a truncation.
    """

    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    before_change: Callable[[], None] = lambda: None
    """Called before each write, truncation and sync: the instants between which power can fail."""

    @classmethod
    def holding(cls, content: bytes) -> SimulatedDisk:
        """A disk with durable content."""
        return cls(bytearray(content), bytes(content))

    def size(self) -> int:
        return len(self.content)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset : offset + length])

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.before_change()
        self.pending.append((offset, bytes(data)))
        _write(self.content, offset, bytes(data))

    def truncate(self, size: int) -> None:
        self.before_change()
        self.pending.append((size, None))
        _truncate(self.content, size)

    def sync(self) -> None:
        self.before_change()
        self.durable = bytes(self.content)
        self.pending.clear()

    def close(self) -> None:
        pass

    def after_power_cut(self, chance: random.Random) -> bytes:
        """What the disk might hold: the durable part and, sector by sector, some of what came since."""
        left = bytearray(self.durable)
        for place, data in self.pending:
            if data is None:
                if chance.random() < 0.5:
                    _truncate(left, place)
                continue
            pieces = list(_sectors(place, data))
            chance.shuffle(pieces)
            for offset, piece in pieces[: chance.randint(0, len(pieces))]:
                _write(left, offset, piece)
        return bytes(left)


def _sectors(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    """The data cut up at the sectors' borders."""
    pieces = []
    begin = 0
    while begin < len(data):
        end = min(len(data), begin + SECTOR - (offset + begin) % SECTOR)
        pieces.append((offset + begin, data[begin:end]))
        begin = end
    return pieces


def _truncate(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        _truncate(content, offset)
    content[offset : offset + len(data)] = data
