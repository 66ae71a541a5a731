"""Images of both layouts on simulated disks, and what becomes of them when a process or the power dies."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from uuid import UUID

import pytest

from overlay.formats.flat import changes, grains, header, log
from overlay.formats.flat import image as flat_image
from overlay.formats.flat.create import new_header as new_flat_header
from overlay.formats.flat.create import write_map, write_on_device, write_trailer
from overlay.formats.flat.open import Parts, assemble
from overlay.formats.image import Backing, Image
from overlay.formats.qed import tables
from overlay.formats.qed.create import new_header as new_qed_header
from overlay.formats.qed.image import QedImage
from tests.support.simulation import SECTOR, SimulatedDisk

CLUSTER = 4096
CLUSTERS = 75
SIZE = CLUSTERS * CLUSTER - 3 * SECTOR
"""The last cluster is not whole. So small that its sectors can all be looked at after each crash."""

CHUNK = 16
"""Clusters that an entry of a flat map's directory tells of, as long as the tables are small."""

BACKING = Backing("nbd://h/disk", raw=True)


class World(ABC):
    """The disks of one image."""

    disks: list[SimulatedDisk]

    @abstractmethod
    def open(self) -> Image:
        """A new process opens the image to write to it."""

    def kill(self) -> None:
        """The process is gone, what it wrote is not."""
        self.disks = [disk.reopened() for disk in self.disks]

    def cut_power(self, chance: random.Random) -> None:
        """What was not synced may be lost."""
        self.disks = [SimulatedDisk.holding(disk.after_power_cut(chance)) for disk in self.disks]

    def during_sync(self, call: Callable[[], object]) -> None:
        """Call something in the middle of the next flush, where one thread may do so; else at once."""
        call()

    def watch(self, before_change: Callable[[], None], torn_pages: int) -> None:
        """Call something at each instant at which the world may end."""
        for disk in self.disks:
            disk.before_change, disk.torn_pages = before_change, torn_pages


class QedWorld(World):
    """A QED image whose tables are small and fall out of the caches all the time."""

    def __init__(self) -> None:
        made = new_qed_header(SIZE, BACKING, CLUSTER, 2)
        content = (made.pack() + BACKING.name.encode()).ljust(made.l1_table_offset + made.table_bytes, b"\0")
        self.disks = [SimulatedDisk.holding(content)]

    def open(self) -> Image:
        return QedImage(self.disks[0], "disk", writable=True)


class FlatWorld(World):
    """A flat image with many small chunks and a short log."""

    def __init__(self) -> None:
        self.disks = [SimulatedDisk(), SimulatedDisk()]
        made = new_flat_header(SIZE, (BACKING,))
        write_trailer(self.disks[0], made)
        write_map(self.disks[1], made)
        self.boot = 0

    def open(self) -> Image:
        return assemble(
            self._parts(),
            writable=True,
            boot=UUID(int=self.boot),
            remove_map=self._remove_map,
        )

    def cut_power(self, chance: random.Random) -> None:
        super().cut_power(chance)
        self.boot += 1

    def during_sync(self, call: Callable[[], object]) -> None:
        self.disks[0].during_sync = call

    def _parts(self) -> Parts:
        data, *maps = self.disks
        return Parts.of_file(data, maps[0] if maps else None, "disk")

    def _remove_map(self) -> None:
        self.disks[1].before_change()
        del self.disks[1:]


class DeviceWorld(FlatWorld):
    """The same on a block device that is a little larger than the disk, or exactly as large."""

    ROOM = 0
    OLD = bytes(range(256)) * (-(-(SIZE + 4096) // 256))
    """What was on the device before."""

    def __init__(self) -> None:
        old = self.OLD[: SIZE + self.ROOM]
        self.disks = [SimulatedDisk.holding(old), SimulatedDisk()]
        made = replace(new_flat_header(SIZE, (BACKING,)), device=header.Device(len(old), "/dev/x"))
        write_on_device(self.disks[0], self.disks[1], made, "/state/x.map", old[-4096:])
        self.boot = 0

    def _parts(self) -> Parts:
        device, *maps = self.disks
        return Parts.of_device(device, maps[0] if maps else None, "/dev/x", "/state/x.map")

    def open(self) -> Image:
        parts = self._parts()
        size = SIZE if parts.header is None else None
        return assemble(
            parts, writable=True, boot=UUID(int=self.boot), remove_map=self._remove_map, size=size
        )


class LargerDeviceWorld(DeviceWorld):
    """A part of the trailer lies behind the disk."""

    ROOM = 5 * SECTOR


@contextmanager
def small_tables() -> Iterator[None]:
    """Everything that is cached, cut up or filled up is so small that it happens on 75 clusters."""
    log_half = 4 * log.RECORD_BYTES
    directory = header.LOG_AT + 2 * log_half
    pair = 2 * CHUNK // 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "SLICE_ENTRIES", 16)
        patch.setattr(tables, "CACHED_SLICES", 2)
        patch.setattr(tables, "DIRTY_SLICES", 3)
        for module in (header, grains, changes, flat_image):
            patch.setattr(module, "CHUNK_GRAINS", CHUNK, raising=False)
            patch.setattr(module, "PAIR_BYTES", pair, raising=False)
            patch.setattr(module, "DIRECTORY_AT", directory, raising=False)
        patch.setattr(flat_image, "_CHUNKS_TOGETHER", 2)
        patch.setattr(grains, "CACHED_PAIRS", 2)
        patch.setattr(grains, "DIRTY_PAIRS", 3)
        patch.setattr(log, "LOG_HALF_BYTES", log_half)
        patch.setattr(log, "HALF_RECORDS", 4)
        patch.setattr(flat_image, "_STEP", 24 * CLUSTER)
        yield
