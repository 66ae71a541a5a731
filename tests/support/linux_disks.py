"""The demo's guest, a Linux, with several disks of different sizes, on all of which it writes.

It remembers in its RAM what it wrote, and the host compares the rest of each disk, block by block.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from recipes.demo import disk, initramfs, kernel
from recipes.demo.disk import Original
from recipes.demo.guest import Guest, Memory
from recipes.demo.records import cells_on, extents, newest
from recipes.plans.disks import PlannedDisk
from recipes.plans.limits import Limits
from recipes.plans.plan import Destination, Export, Plan, Source
from tests.support.disks import MIB
from tests.support.guests import short_directory
from tests.support.processes import Process
from tests.support.servers import UnixAddress
from tests.support.vms import Scene, stopped_with

SIZES = (32 * MIB, 8 * MIB, 16 * MIB)


@dataclass(frozen=True)
class LinuxDisk:
    """One of its disks, and the block node that both QEMUs have it as."""

    drive: str
    original: Original
    image: Path
    target: Path


class LinuxDisks(Scene):
    """Hosts A and B in one directory, the guest that runs on A, and the plan to move it."""

    def __init__(self, directory: Path, engine: str = "overlay", sizes: Sequence[int] = SIZES) -> None:
        self.directory = directory
        self.engine = engine
        fetched = kernel.fetch(None)
        self.guest_on_a, self.guest_on_b = (
            Guest(
                *(fetched.image, directory / "initramfs", directory / f"{host}.console"),
                control=directory / f"{host}.control",
                disks=len(sizes),
            )
            for host in ("a", "b")
        )
        initramfs.build(self.guest_on_a.initramfs, fetched)
        self.layout = "qed" if engine == "qemu" else "raw"
        self.disks = [
            LinuxDisk(drive, Original(size), directory / f"a{n}.raw", directory / f"b{n}.{self.layout}")
            for n, (drive, size) in enumerate(zip(self.guest_on_a.drives, sizes, strict=True))
        ]
        for each in self.disks:
            each.original.write(each.image)
        self.monitor_a, self.monitor_b = directory / "a.qmp", directory / "b.qmp"
        self.plan = Plan(
            Source(qmp=str(self.monitor_a)),
            Export(uri=UnixAddress(directory / "nbd").uri("vm")),
            Destination(
                qemu=self.guest_on_b.qemu,
                qmp=str(self.monitor_b),
                migration=f"unix:{directory / 'migration'}",
                engine=engine,
            ),
            limits=Limits(connect=60.0, command=60.0, start=120.0, reconnect_delay=2, speed=16 * MIB),
            disk=tuple(
                PlannedDisk(str(each.image), str(each.target), each.drive, each.drive) for each in self.disks
            ),
        )

    def source_qemu(self) -> list[str]:
        """A's command line."""
        nodes = (
            {
                "driver": "raw",
                "node-name": each.drive,
                "file": {"driver": "file", "filename": str(each.image)},
            }
            for each in self.disks
        )
        return [
            *self.guest_on_a.qemu,
            *(word for node in nodes for word in ("-blockdev", json.dumps(node))),
            *("-qmp", f"unix:{self.monitor_a},server=on,wait=off"),
        ]

    def verify_on(self, guest: Guest) -> Memory:
        """Let the guest compare its disks with what it remembers, and switch it off."""
        memory = asyncio.run(guest.verify())
        asyncio.run(guest.stop())
        return memory

    def faults(self, memory: Memory) -> list[str]:
        """What is wrong with the disks on B, when nobody uses them any more."""
        count, found = len(self.disks), []
        if memory.bad:
            found.append(f"{memory.bad} records are wrong: {memory.complaint}")
        places = 0
        for number, each in enumerate(self.disks):
            cells = cells_on(each.original.size)
            written = len(newest(memory.written, cells, number, count))
            places += written
            where = extents(memory.written, cells, number, count)
            compared = disk.compare(each.original, each.target, self.layout, where)
            if not written:
                found.append(f"{each.drive}: the guest has written nothing")
            if not compared.equal:
                found.append(f"{each.drive}: {compared.different} blocks, the first at {compared.first}")
        if memory.live != places:
            found.append(f"the guest re-read {memory.live} records of {places}")
        return found


@contextmanager
def linux_disks(engine: str = "overlay") -> Iterator[LinuxDisks]:
    """The guest, that runs on A and writes; whatever of it is left in the end is killed."""
    with short_directory() as directory:
        made = LinuxDisks(directory, engine)
        with Process(made.source_qemu(), directory / "a.log") as machine, stopped_with(made):
            machine.wait_for(lambda: made.guest_on_a.ready, "the guest finds its disks", seconds=60)
            asyncio.run(made.guest_on_a.reach(48, 600))
            yield made
