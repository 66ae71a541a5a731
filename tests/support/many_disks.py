"""A guest with several disks of different sizes, on all of which it writes, and a migration of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.plans.disks import PlannedDisk
from tests.support.boot_sector import COUNTER, RECORDS, SECTOR, boot_sector, newest, number_in
from tests.support.disks import MIB, random_bytes
from tests.support.processes import check
from tests.support.vms import QEMU, Role, Scene, monitor, running

SIZES = (32 * MIB, 8 * MIB, 16 * MIB)
"""Powers of two, as the guest's random reads are masked with them."""


@dataclass(frozen=True)
class GuestDisk:
    """One of its disks: what was on it at first, and where it is on A, on B, and on A in the end."""

    drive: str
    original: bytes
    image: Path
    target: Path
    moved: Path

    @property
    def away(self) -> Path:
        """Where its image on A is from the cut-over until it is moved aside."""
        return self.image if self.image.is_block_device() else Path(f"{self.image}.moved")


class ManyDisks(Scene):
    """Hosts A and B in one directory, a guest with several disks that runs on A, and the plan to move it."""

    def __init__(self, directory: Path, engine: str = "overlay", sizes: Sequence[int] = SIZES) -> None:
        super().__init__(directory, engine, disk_size=min(sizes))
        self.engine = engine
        self.image.unlink()
        aside = directory / "aside"
        aside.mkdir()
        layout = "qed" if engine == "qemu" else "raw"
        self.disks = []
        for number, size in enumerate(sizes):
            code = boot_sector(sizes) if number == 0 else b""
            original = code + random_bytes(size - len(code), seed=number)
            name = f"a{number}.raw"
            disk = GuestDisk(
                *(f"disk{number}", original, directory / name, directory / f"b{number}.{layout}"),
                moved=aside / name,
            )
            disk.image.write_bytes(original)
            self.disks.append(disk)
        here = dataclasses.replace(self.plan.source, image="", node="")
        there = dataclasses.replace(self.plan.destination, image="", node="")
        # A monitor has one client, which may be the migration.
        self.second_b = directory / "b2.qmp"
        second = f"socket,id=second,path={self.second_b},server=on,wait=off"
        there = dataclasses.replace(
            there,
            qemu=(
                *(*QEMU, *self.devices(), "-serial", f"file:{directory / 'b.serial'}"),
                *("-chardev", second, "-mon", "chardev=second,mode=control"),
            ),
        )
        self.plan = dataclasses.replace(
            self.plan,
            source=here,
            destination=there,
            finish=dataclasses.replace(self.plan.finish, move_aside=str(aside)),
            disk=tuple(
                PlannedDisk(image=str(disk.image), target=str(disk.target), drive=disk.drive)
                for disk in self.disks
            ),
        )

    def devices(self) -> list[str]:
        """The disks' devices, which the BIOS numbers in this order."""
        device = "virtio-blk-pci,rerror=stop,werror=stop"
        return [
            word
            for number, disk in enumerate(self.disks)
            for word in ("-device", f"{device},drive={disk.drive},bootindex={number}")
        ]

    def source_qemu(self) -> list[str]:
        """A's command line."""
        blocks = [
            {
                "driver": "raw",
                "node-name": disk.drive,
                "file": {
                    "driver": "host_device" if disk.image.is_block_device() else "file",
                    "filename": str(disk.image),
                },
            }
            for disk in self.disks
        ]
        return [
            *QEMU,
            *self.devices(),
            *("-serial", f"file:{self.directory / 'a.serial'}"),
            *(word for block in blocks for word in ("-blockdev", json.dumps(block))),
            *("-qmp", f"unix:{self.monitor_a},server=on,wait=off"),
        ]

    def put_on(self, number: int, device: Path) -> None:
        """From now on an image is this device, which stays where it is in the end."""
        self.disks[number] = dataclasses.replace(self.disks[number], image=device, moved=device)
        self.change_disk(number, image=str(device))

    def change_disk(self, number: int, **values: Any) -> None:
        """Change keys of one disk of the plan."""
        disks = list(self.plan.disk)
        disks[number] = dataclasses.replace(disks[number], **values)
        self.plan = dataclasses.replace(self.plan, disk=tuple(disks))

    def switch_off_b(self) -> None:
        """Press the key at which the guest on B switches itself off."""
        with monitor(self.second_b) as b:
            b.execute("send-key", keys=[{"type": "qcode", "data": "x"}])

    def stop_b(self) -> int:
        """Stop the guest on B and end its QEMU; the number of the record that it was about to write."""
        counter = self.stop_guest_on_b()
        self.quit_b()
        return counter

    def stop_guest_on_b(self) -> int:
        """Stop the guest on B; the number of the record that it was about to write."""
        with monitor(self.monitor_b) as b:
            b.execute("stop")
            told = b.execute("human-monitor-command", command_line=f"xp /1wx {COUNTER:#x}")
        return int(re.findall(r"0x[0-9a-f]+", told)[-1], 16)

    def verdict(self, counter: int | None = None) -> list[str]:
        """What is wrong on B's disks, sector by sector.

        With ``counter``, as ``stop_b`` gives it, each record must be the newest that was acknowledged;
        without it, as after a crash, any that the guest has written there.
        """
        wrong = []
        for index, disk in enumerate(self.disks):
            copy = self.directory / "copy.raw"
            check("qemu-img", "convert", "-f", disk.target.suffix[1:], "-O", "raw", disk.target, copy)
            moved = copy.read_bytes()
            copy.unlink()
            assert len(moved) == len(disk.original)
            for at in range(0, len(moved), SECTOR):
                content, before = moved[at : at + SECTOR], disk.original[at : at + SECTOR]
                if not self._is_right(index, at // SECTOR, content, before, counter):
                    wrong.append(f"{disk.drive}: sector {at // SECTOR}: {content[:16].hex()}")
        return wrong

    def wrong_sectors(self, *, interrupted: bool = False) -> list[int]:
        """How many sectors are wrong on the first disk, the second, and so on; nothing where none is."""
        wrong = self.verdict()
        counts = [sum(each.startswith(f"{disk.drive}:") for each in wrong) for disk in self.disks]
        return counts if wrong else []

    def _is_right(self, index: int, sector: int, content: bytes, before: bytes, counter: int | None) -> bool:
        if sector not in RECORDS:
            return content == before
        number = number_in(content)
        if counter is None:
            mine = number is not None and number % len(self.disks) == index
            return content == before or (mine and RECORDS.start + (number or 0) % len(RECORDS) == sector)
        # The last one may have been under way.
        wanted = {newest(sector, last, index, len(self.disks)) for last in (counter - 1, counter)}
        return (content == before and 0 in wanted) or number in wanted - {0}

    def content(self, image: Path) -> bytes:
        """What a disk of A holds."""
        return image.read_bytes()

    def assert_moved(self) -> None:
        """The guest works on B, on nothing but its own disks, and A's were moved aside."""
        self.wait_until_guest_works("b")
        self.wait_until_only({Role.B})
        with monitor(self.monitor_b) as b:
            nodes = b.execute("query-named-block-nodes", flat=True)
        assert {each["drv"] for each in nodes} <= {"raw", "file", "qed", "copy-on-read"}
        for disk in self.disks:
            assert disk.image.is_block_device() or not disk.image.exists()
            place = disk.away if disk.moved == disk.image else disk.moved
            assert self.content(place)[: 512 * 2048] == disk.original[: 512 * 2048]
        left = {path.name for path in self.directory.glob("b*.raw.*") if path.suffix != ".log"}
        assert left == set()
        assert self.verdict(self.stop_b()) == []


@contextlib.contextmanager
def many_disks(directory: Path, engine: str = "overlay", sizes: Sequence[int] = SIZES) -> Iterator[ManyDisks]:
    """A guest that runs on A, with a disk of each of these sizes in bytes."""
    made = ManyDisks(directory, engine, sizes)
    with running(made):
        yield made
