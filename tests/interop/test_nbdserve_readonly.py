"""What cannot be written is not offered as writable."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest
from qemu.qmp import ExecuteError

from tests.support.disks import KIB, MIB, random_disk
from tests.support.loops import loop_device
from tests.support.monitors import monitor
from tests.support.processes import Argument, Process, check, run
from tests.support.servers import NBDSERVE, UnixAddress, nbdserve

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can set a device read-only")

REFUSAL = "the device is not writable: serve it read-only (-r)\n"
"""How the line about a read-only block device ends."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 1 MiB."""
    path = tmp_path / "disk.img"
    random_disk(path, MIB)
    return path


@contextmanager
def set_read_only(device: Path) -> Iterator[None]:
    """Let the kernel refuse writes to a block device."""
    check("blockdev", "--setro", device)
    try:
        yield
    finally:
        check("blockdev", "--setrw", device)


@root_only
@pytest.mark.parametrize("options", [[], ["--cache=none"], ["--detect-zeroes=unmap"]], ids=str)
@pytest.mark.parametrize("how", ["losetup -r", "blockdev --setro"])
def test_a_read_only_device_is_refused_as_qemu_nbd_does_unless_it_is_served_read_only(
    image: Path, tmp_path: Path, how: str, options: list[str]
) -> None:
    with loop_device(image, *(["-r"] if how == "losetup -r" else [])) as device:
        if how != "losetup -r":
            check("blockdev", "--setro", device)
        assert os.access(device, os.W_OK)
        stock = run("qemu-nbd", "-f", "raw", "-k", tmp_path / "qemu.sock", device, seconds=10)
        assert "The device is not writable" in stock.stderr
        done = run(NBDSERVE, "-f", "raw", *options, "-k", tmp_path / "nbd.sock", device, seconds=10)
        assert (done.returncode, done.stderr) == (1, f"nbdserve: {device}: {REFUSAL}")
        with nbdserve("-f", "raw", "-r", *options, device, directory=tmp_path) as server:
            check("nbdcopy", server.uri(), tmp_path / "copy.img")
        check("blockdev", "--setrw", device)
    assert (tmp_path / "copy.img").read_bytes() == image.read_bytes()


@root_only
def test_a_read_only_device_is_refused_by_the_monitor_too(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    random_disk(other, MIB)
    qmp = tmp_path / "qmp"
    with (
        loop_device(image, "-r") as device,
        nbdserve("-f", "raw", "--qmp", f"unix:{qmp}", other, directory=tmp_path) as server,
        monitor(qmp) as control,
    ):
        export = {"type": "nbd", "id": "x", "name": "x", "filename": str(device), "format": "raw"}
        with pytest.raises(ExecuteError, match=re.escape(f"{device}: {REFUSAL.strip()}")):
            control.execute("block-export-add", writable=True, **export)
        control.execute("block-export-add", writable=False, **export)
        check("nbdcopy", server.uri("x"), tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == image.read_bytes()


@root_only
def test_a_device_that_becomes_read_only_fails_writes_with_eperm_and_the_log_says_so(
    image: Path, tmp_path: Path
) -> None:
    before = image.read_bytes()
    with loop_device(image) as device, nbdserve("-f", "raw", device, directory=tmp_path) as server:
        client = nbd.NBD()
        client.connect_uri(server.uri())
        with set_read_only(device):
            writes: list[Callable[[], None]] = [
                lambda: client.pwrite(b"x" * 4096, 0),
                lambda: client.pwrite(b"x" * 512 * KIB, 0),
                lambda: client.zero(4096, 0),
                lambda: client.trim(4096, 0),
            ]
            for write in writes:
                with pytest.raises(nbd.Error) as refused:
                    write()
                assert refused.value.errnum == errno.EPERM
            assert client.pread(MIB, 0) == before
        client.pwrite(before[:4096], 0)
        client.flush()
        client.shutdown()
        assert "write of 4096 bytes at 0 fails with EPERM: Operation not permitted" in server.log.read_text()
    assert image.read_bytes() == before


@root_only
@pytest.mark.parametrize("options", [[], ["--cache=none"]], ids=str)
def test_an_image_on_a_read_only_mount_is_refused_unless_it_is_served_read_only(
    image: Path, tmp_path: Path, options: list[str]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    mount = 'mount --bind "$1" "$2" && mount -o remount,ro,bind "$2" && shift 2 && exec "$@"'
    apart: list[Argument] = ["unshare", "--mount", "sh", "-c", mount, "sh", tmp_path, place]
    address, pid_file = UnixAddress(tmp_path / "nbd.sock"), tmp_path / "pid"
    serve: list[Argument] = [*apart, NBDSERVE, "-f", "raw", *options, "-k", address.path, place / "disk.img"]
    done = run(*serve, seconds=10)
    why = "cannot be opened for writing: Read-only file system: serve it read-only (-r)"
    assert (done.returncode, done.stderr) == (1, f"nbdserve: {place / 'disk.img'}: {why}\n")
    with Process([*serve, "-r", "--pid-file", pid_file], tmp_path / "ro.log") as server:
        server.wait_for_pid_file(pid_file)
        check("nbdcopy", address.uri(), tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == image.read_bytes()


@root_only
@pytest.mark.parametrize("options", [[], ["--cache=none"]], ids=str)
def test_an_immutable_image_is_refused_unless_it_is_served_read_only(
    image: Path, tmp_path: Path, options: list[str]
) -> None:
    if run("chattr", "+i", image).returncode:
        pytest.skip("the file system knows no immutable files")
    try:
        done = run(NBDSERVE, "-f", "raw", *options, "-k", tmp_path / "nbd.sock", image, seconds=10)
        why = "cannot be opened for writing: Operation not permitted: serve it read-only (-r)"
        assert (done.returncode, done.stderr) == (1, f"nbdserve: {image}: {why}\n")
        with nbdserve("-f", "raw", "-r", *options, image, directory=tmp_path) as server:
            check("nbdcopy", server.uri(), tmp_path / "copy.img")
    finally:
        check("chattr", "-i", image)
