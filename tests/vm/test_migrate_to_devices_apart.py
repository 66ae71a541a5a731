"""A Linux moves, between hosts that ssh leads to, to block devices, whatever these are like."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from overlay.formats.device.map_place import name_of
from tests.support.disks import MIB
from tests.support.hosts_of_matrix import MatrixGuest, guest_on_a
from tests.support.linux_disks import LinuxDisk
from tests.support.loops import loop_device
from tests.support.vms import AS_NOBODY_LATER

NOBODY = 65534
BEHIND = b"\xa5" * (MIB + 4096)
"""What a device holds behind its disk."""


@contextmanager
def devices(stage: MatrixGuest, sector: str) -> Iterator[list[Path]]:
    """A device on B for each of the disks, with logical sectors of so many bytes."""
    with ExitStack() as stack:
        made = []
        for number, disk in enumerate(stage.disks):
            # Of a device of A there are logs.
            stack.callback(shutil.rmtree, state_of(disk.image), ignore_errors=True)
            file = stage.directory / f"device{number}"
            file.write_bytes(b"\x5a" * disk.original.size + BEHIND)
            device = stack.enter_context(loop_device(file, "--sector-size", sector))
            stack.callback(shutil.rmtree, state_of(device), ignore_errors=True)
            made.append(device)
        yield made


@contextmanager
def given_to(owner: int, paths: Iterable[Path]) -> Iterator[None]:
    """These are this user's meanwhile."""
    with ExitStack() as stack:
        for path in paths:
            stack.callback(os.chown, path, path.stat().st_uid, -1)
            os.chown(path, owner, -1)
        yield


def state_of(device: Path) -> Path:
    """Where what belongs to the device is."""
    return Path("/var/lib/nbd-migrate") / name_of(str(device))


def found_on(device: Path, disk: LinuxDisk, copy: Path) -> LinuxDisk:
    """The disk as a file, as it is on the device; what is behind it there must be as before."""
    content = device.read_bytes()
    assert content[disk.original.size :] == BEHIND
    copy.write_bytes(content[: disk.original.size])
    return replace(disk, target=copy)


STANDS_FOR_THE_OTHERS = ("device", "hybrid", "4096", "nobody", "tls")
SINGLE = ("raw", "postcopy", "512", "root", "single")


def parameters() -> list[object]:
    """Each kind of disk on A, policy, logical sector on B and user of both QEMUs, over TLS; and one more."""
    forms, users = ("raw", "device"), ("root", "nobody")
    cells = [*itertools.product(forms, ("postcopy", "hybrid"), ("512", "4096"), users, ("tls",)), SINGLE]
    exhaustive = pytest.mark.exhaustive
    return [pytest.param(*cell, marks=() if cell == STANDS_FOR_THE_OTHERS else exhaustive) for cell in cells]


@pytest.mark.parametrize(("form", "policy", "sector", "user", "channel"), parameters())
@pytest.mark.representative
def test_disks_move_to_devices_of_another_host(
    form: str, policy: str, sector: str, user: str, channel: str
) -> None:
    options, owner = (AS_NOBODY_LATER, NOBODY) if user == "nobody" else ((), 0)
    with (
        guest_on_a(form, 2, "-drive", options=options) as stage,
        devices(stage, sector) as made,
        # To give its disks up A's QEMU opens them once more.
        given_to(owner, [*made, *(disk.image for disk in stage.disks)]),
    ):
        words = [f"--target={disk.drive}={device}" for disk, device in zip(stage.disks, made, strict=True)]
        words += [f"--overwrite={device}" for device in made]
        stage.directory.chmod(0o755)
        stage.run_between("a", "b", "--channel", channel, "--policy", policy, *words)
        stage.works()
        memory = stage.verify_on(stage.guest_on_b)
        for device in made:
            assert [each.name for each in state_of(device).iterdir() if each.suffix != ".log"] == []
        stage.disks = [
            found_on(device, disk, stage.directory / f"copy{number}")
            for number, (device, disk) in enumerate(zip(made, stage.disks, strict=True))
        ]
        assert stage.faults(memory) == []
