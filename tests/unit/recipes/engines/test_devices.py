"""Block devices on B, as they are looked at before anything is started."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from recipes.engines.devices import check_devices
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.migrate.runtime import Migration
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Destination, Export, Plan, Source
from recipes.steps.create import placed
from recipes.steps.preflight import check_targets
from tests.support.disks import MIB, random_disk
from tests.support.loops import loop_device
from tests.support.overlays import NBD_OVERLAY
from tests.support.processes import check, run

SIZE = 8 * MIB
B = Host("B")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A device on which there is something."""
    random_disk(tmp_path / "file", SIZE + MIB)
    with loop_device(tmp_path / "file") as made:
        yield made


def plan_of(target: Path, state: Path, *, overwrite: bool = True) -> Plan:
    """A plan for one disk that goes there."""
    return Plan(
        Source(qmp="/a.qmp"),
        Export(uri="nbd://127.0.0.1/vm"),
        Destination(
            qemu=("qemu",),
            qmp="/b.qmp",
            migration="unix:/m",
            overwrite=(str(target),) if overwrite else (),
        ),
        disk=(PlannedDisk("/a.raw", str(target), "disk0", state=str(state)),),
    )


def complaint(plan: Plan, size: int = SIZE) -> str:
    """The line with which a disk of this size is refused."""
    with pytest.raises(MigrationError) as caught:
        asyncio.run(check_targets(plan, [size], B))
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_larger_device_is_taken_and_what_is_to_be_known_is_told(device: Path, tmp_path: Path) -> None:
    plan, before = plan_of(device, tmp_path / "state" / "x"), device.read_bytes()
    assert asyncio.run(check_targets(plan, [SIZE], B)) == [
        f"{device} on B: what is on it is overwritten",
        f"{device} on B is 1 MiB larger than the disk: the guest sees none of that until it is started anew; "
        f"with size={SIZE} on the raw node it never does",
    ]
    device.write_bytes(bytes(SIZE + MIB))
    assert asyncio.run(check_targets(plan, [SIZE + MIB], B)) == []
    device.write_bytes(before)
    assert not (tmp_path / "state").exists()


def test_what_is_on_a_device_is_overwritten_only_if_the_operator_has_said_so(
    device: Path, tmp_path: Path
) -> None:
    plan = plan_of(device, tmp_path / "state", overwrite=False)
    told = f"disk.target: there is something on {device} on B, which would be lost; if it is the right device"
    assert complaint(plan).startswith(told)
    assert f"say so: --overwrite {device}, or in the plan overwrite under [destination]" in complaint(plan)
    device.write_bytes(bytes(SIZE + MIB))
    asyncio.run(check_targets(plan, [SIZE], B))


@dataclass(frozen=True)
class Counting(Host):
    """A host that knows what was run there."""

    commands: list[tuple[str, ...]] = field(default_factory=list)

    async def run(self, *command: str, limit: float, given: str | Awaitable[str] = "") -> str:
        """Note it, and run it."""
        self.commands.append(command)
        return await super().run(*command, limit=limit, given=given)


def test_a_device_costs_one_command_and_all_together_two_more(tmp_path: Path) -> None:
    """Over ssh each of them is a round trip, and a Python that starts there."""
    with ExitStack() as stack:
        disks = []
        for number in range(3):
            random_disk(tmp_path / f"file{number}", SIZE)
            device = stack.enter_context(loop_device(tmp_path / f"file{number}"))
            disks.append(PlannedDisk(f"/{number}", str(device), f"disk{number}", state=f"{tmp_path}/s"))
        plan = plan_of(Path(disks[0].target), tmp_path)
        names = tuple(disk.target for disk in disks)
        plan = replace(plan, disk=tuple(disks), destination=replace(plan.destination, overwrite=names))
        b = Counting("B")
        assert len(asyncio.run(check_devices(plan, [SIZE] * 3, b))) == 3
        assert len(b.commands) == 3 + 2


def test_what_is_no_place_for_the_disk_is_refused(device: Path, tmp_path: Path) -> None:
    plan = plan_of(device, tmp_path / "state")
    assert f"it has {SIZE + MIB} bytes, too few for a disk of {16 * MIB}" in complaint(plan, 16 * MIB)
    held = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        assert "disk.target: " in (told := complaint(plan))
        assert "the device is in use: mounted, or held by another" in told
    finally:
        os.close(held)
    there = "disk.target: there is no block device /dev/no-such on B; make it (lvcreate), of 8388608 bytes"
    assert there in complaint(plan_of(Path("/dev/no-such"), tmp_path))
    link = tmp_path / "link"
    link.symlink_to(device)
    disk = replace(plan.disks[0], target=str(link), state="")
    by_link = replace(plan, disk=(disk,), destination=replace(plan.destination, overwrite=()))
    assert f"{link} is a block device on B; name it by its path below /dev" in complaint(by_link)
    (tmp_path / "file-in-the-way").touch()
    blocked = plan_of(device, tmp_path / "file-in-the-way" / "x")
    assert f"nothing may be made in {tmp_path}/file-in-the-way: name another directory" in complaint(blocked)


def test_an_overlay_that_is_not_complete_is_refused_with_what_removes_it(
    device: Path, tmp_path: Path
) -> None:
    plan, before = plan_of(device, tmp_path / "state"), device.read_bytes()
    create = (NBD_OVERLAY, "create", "--force", "--backing", "nbd://h/x", "--size", str(SIZE))
    check(*create, "--map", tmp_path / "other.map", device)
    told = complaint(plan)
    assert f"there is an overlay on {device} on B that is not complete" in told
    check(*told.rpartition("with: ")[2].split())
    assert device.read_bytes() == before
    check(*create, "--map", plan.disks[0].map, device)
    told = complaint(plan)
    check(*told.rpartition("with: ")[2].split())
    assert device.read_bytes() == before
    asyncio.run(check_targets(plan, [SIZE], B))


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_has_come_on_a_device_since_step_1_is_not_overwritten_either_unless_that_was_said(
    device: Path, tmp_path: Path, overwrite: bool
) -> None:
    before = device.read_bytes()
    plan = plan_of(device, tmp_path / "state", overwrite=overwrite)
    words = placed(cast(Migration, SimpleNamespace(plan=plan)), plan.disks[0])
    made = run(NBD_OVERLAY, "create", "--backing", "nbd://h/x", "--size", str(SIZE), *words, device)
    assert (made.returncode == 0) == overwrite, made.stderr
    assert (device.read_bytes() == before) == (not overwrite)
    assert Path(plan.disks[0].map).exists() == overwrite
