"""The guest's host is lost with its disk: the guest boots on the other host, from the mirror."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.boot_sector import SECTOR, is_record, number_in
from tests.support.mirrors import receiver
from tests.support.overlays import NBD_OVERLAY, make_overlay, overlay
from tests.support.processes import Process, check, wait_until
from tests.support.servers import UnixAddress, nbdserve
from tests.support.vms import DISK_SIZE, QEMU, original_disk


@contextmanager
def guest(socket: Path, console: Path) -> Iterator[Process]:
    """A guest that boots from the disk at this socket, as docs/overlay.md says; it is killed in the end."""
    node = {"driver": "nbd", "node-name": "disk", "server": {"type": "unix", "path": str(socket)}}
    device = ("-device", "virtio-blk-pci,drive=disk,bootindex=1")
    argv = [*QEMU, "-blockdev", json.dumps(node), *device, "-serial", f"file:{console}"]
    with Process(argv, console.with_suffix(".log")) as process:
        yield process
        process.kill()


def records(console: Path) -> int:
    """How many records a guest has written since its start."""
    return console.read_bytes().count(b".") if console.exists() else 0


@pytest.mark.representative
def test_a_guest_whose_host_is_lost_with_its_disk_boots_from_the_mirror(tmp_path: Path) -> None:
    old = original_disk(DISK_SIZE)
    (tmp_path / "old.raw").write_bytes(old)
    with nbdserve("-r", "-f", "raw", tmp_path / "old.raw", directory=tmp_path) as server:
        mirror = make_overlay(tmp_path / "mirror.img", "flat", DISK_SIZE, server.uri())
        image = make_overlay(tmp_path / "b.img", "flat", DISK_SIZE, server.uri())
        socket, console = tmp_path / "mirror.sock", tmp_path / "b.console"
        with receiver(mirror, socket, tmp_path):
            options = ("--stream", "--mirror-writes", UnixAddress(socket).uri())
            with (
                overlay(image, *options, directory=tmp_path) as daemon,
                guest(daemon.address.path, console) as running,
            ):
                wait_until(lambda: records(console) >= 20, "the guest works", 60.0)
                least, now = records(console), time.time()
                wait_until(
                    lambda: daemon.status()["mirror"]["point-time"] > now, "the mirror has a point", 60.0
                )
                running.kill()
                daemon.process.kill()
            for lost in (image, Path(f"{image}.map")):
                lost.unlink(missing_ok=True)
        assert "the disk as of" in check(NBD_OVERLAY, "receive", "--finish", mirror)
        console = tmp_path / "a.console"
        with (
            overlay(mirror, "--stream", directory=tmp_path) as daemon,
            guest(daemon.address.path, console),
        ):
            wait_until(lambda: records(console) >= 3, "the guest works again", 60.0)
            daemon.wait_for_status(complete=True)
    found = mirror.read_bytes()
    assert len(found) == DISK_SIZE
    written = []
    for at in range(0, DISK_SIZE, SECTOR):
        sector = found[at : at + SECTOR]
        if sector != old[at : at + SECTOR]:
            assert is_record(at // SECTOR, sector), f"sector {at // SECTOR} holds what nobody wrote"
            written.append(number_in(sector))
    # What the first boot had written by then; the second began with number one, and did not come so far.
    assert max(number or 0 for number in written) >= least > records(console)
    assert (tmp_path / "old.raw").read_bytes() == old
