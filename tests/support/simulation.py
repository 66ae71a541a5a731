"""A disk in memory that can lose its power, and a process that can be killed while it writes to it."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

SECTOR = 512
PAGE = 4096


class KilledError(Exception):
    """The process ends here: raised by ``before_change``, caught by the test."""


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
    during_sync: Callable[[], object] | None = None
    """Called once, while the next sync is under way."""
    torn_pages: int = 0
    """Of a write that is killed, this many pages are done."""
    failing: bool = False
    """Whether syncs fail; like with a real file nothing can be changed after one has."""
    _failed: bool = False
    zero_step: int = 1 << 40

    @classmethod
    def holding(cls, content: bytes) -> SimulatedDisk:
        """A disk with durable content."""
        return cls(bytearray(content), bytes(content))

    def size(self) -> int:
        return len(self.content)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset : offset + length])

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset + len(buffer) > len(self.content):
            raise OSError(errno.EIO, "the disk ends")
        buffer[:] = self.content[offset : offset + len(buffer)]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._refuse_after_failed_sync()
        data = bytes(data)
        try:
            self.before_change()
        except KilledError:
            self._store(offset, data[: max(0, self.torn_pages * PAGE - offset % PAGE)])
            raise
        self._store(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        yield offset, length

    def truncate(self, size: int) -> None:
        self._refuse_after_failed_sync()
        self.before_change()
        self.pending.append((size, None))
        _truncate(self.content, size)

    def sync(self) -> None:
        self._refuse_after_failed_sync()
        self.before_change()
        if self.failing:
            # Some of it is on the disk now, and what is not will never be: the system has forgotten it.
            self._failed = True
            raise OSError(errno.EIO, "Input/output error")
        during, self.during_sync = self.during_sync, None
        if during is not None:
            during()
        self.durable = bytes(self.content)
        self.pending.clear()

    def fileno(self) -> None:
        return None

    def share(self) -> None:
        pass

    def close(self) -> None:
        pass

    def reopened(self) -> SimulatedDisk:
        """The same disk for the next process: nothing is lost by the end of the last."""
        return SimulatedDisk(self.content, self.durable, self.pending)

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

    def _store(self, offset: int, data: bytes) -> None:
        if data:
            self.pending.append((offset, data))
            _write(self.content, offset, data)

    def _refuse_after_failed_sync(self) -> None:
        if self._failed:
            raise OSError(errno.EIO, "writing back to the disk has failed before")


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
