"""--cache, --detect-zeroes and --discard: what they do to the disk, and that data is right with all."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest

from tests.support.disks import KIB, MIB, ODD_SIZE, random_bytes, random_disk
from tests.support.fuse import mounted
from tests.support.loops import loop_device
from tests.support.processes import check
from tests.support.servers import Server, nbdkit, nbdserve, qemu_nbd

FUA = nbd.CMD_FLAG_FUA
MODES = ["none", "writeback", "writethrough", "directsync", "unsafe"]


def connected(uri: str) -> nbd.NBD:
    """A libnbd client that also sends what the server will refuse."""
    client = nbd.NBD()
    client.set_strict_mode(0)
    client.connect_uri(uri)
    return client


@contextmanager
def watched(directory: Path, *options: str) -> Iterator[tuple[Server, Callable[[], list[str]]]]:
    """nbdserve on a disk that logs what is done to it; yields how to read the log as well."""
    journal = directory / "journal"
    with (
        nbdkit("--filter=log", "memory", "4M", f"logfile={journal}", directory=directory) as kit,
        mounted(kit.uri(), directory) as image,
        nbdserve("-f", "raw", *options, image, directory=directory) as server,
    ):

        def accesses() -> list[str]:
            words = [line.split()[3] for line in journal.read_text().splitlines() if " ..." in line]
            done = [word.removeprefix("...") for word in words if word.startswith("...")]
            return [word for word in done if word in ("Write", "Zero", "Trim", "Flush")]

        yield server, accesses


CHANGES: dict[str, Callable[[nbd.NBD], object]] = {
    "write": lambda client: client.pwrite(b"x" * 512, 0),
    "long write": lambda client: client.pwrite(b"x" * MIB, 512),
    "zero": lambda client: client.zero(64 * KIB, 0),
    "trim": lambda client: client.trim(64 * KIB, 0),
}


def test_writethrough_acknowledges_nothing_that_is_not_on_the_disk(tmp_path: Path) -> None:
    with watched(tmp_path, "--cache=writethrough") as (server, accesses):
        client = connected(server.uri())
        for what, change in CHANGES.items():
            before = len(accesses())
            change(client)
            assert len(accesses()) > before + 1, what
            assert accesses()[-1] == "Flush", what
        client.shutdown()


def test_unsafe_never_flushes(tmp_path: Path) -> None:
    with watched(tmp_path, "--cache=unsafe") as (server, accesses):
        client = connected(server.uri())
        for change in CHANGES.values():
            change(client)
        client.pwrite(b"y" * 4096, 0, FUA)
        client.zero(4096, 8192, FUA)
        client.flush()
        client.shutdown()
        assert server.process.terminate() == 0
        assert "Write" in accesses()
        assert "Flush" not in accesses()


@pytest.mark.parametrize("mode", MODES)
def test_data_is_right_with_every_kind_of_cache(tmp_path: Path, mode: str) -> None:
    image = tmp_path / "disk.img"
    content = bytearray(random_disk(image, ODD_SIZE))
    with nbdserve("-f", "raw", f"--cache={mode}", image, directory=tmp_path) as server:
        direct = [number for number in _flags_of(server, image) if number & os.O_DIRECT]
        assert bool(direct) == (mode in ("none", "directsync"))
        check("nbdcopy", "--connections=2", server.uri(), tmp_path / "copy.img")
        assert (tmp_path / "copy.img").read_bytes() == content
        client = connected(server.uri())
        for offset, length in ((1, 1), (4095, 2), (5000, 100_000), (ODD_SIZE - 5000, 5000), (0, 1 * MIB)):
            content[offset : offset + length] = data = random_bytes(length, seed=offset)
            client.pwrite(data, offset)
        client.zero(5000, 2 * MIB + 3)
        content[2 * MIB + 3 : 2 * MIB + 5003] = bytes(5000)
        assert client.pread(ODD_SIZE, 0) == content
        client.flush()
        client.shutdown()
        size = str(ODD_SIZE // 4096 * 4096)
        job = ["--rw=randrw", "--bsrange=512-64k", "--bs_unaligned", "--iodepth=16", f"--size={size}"]
        check("fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri()}", *job, "--number_ios=300",
              "--verify=crc32c", "--verify_state_save=0")  # fmt: skip
        # A copy from another server, so that whatever fio left is compared with the file.
        check("nbdcopy", server.uri(), tmp_path / "after.img")
        assert server.process.terminate() == 0
    assert image.read_bytes() == (tmp_path / "after.img").read_bytes()
    assert image.stat().st_size == ODD_SIZE


def _flags_of(server: Server, path: Path) -> list[int]:
    """The flags with which the server has opened a file, for each of its descriptors."""
    found = []
    for link in Path(f"/proc/{server.pid}/fd").iterdir():
        if os.path.realpath(link) == str(path):
            lines = Path(f"/proc/{server.pid}/fdinfo/{link.name}").read_text().splitlines()
            found += [int(line.split()[1], 8) for line in lines if line.startswith("flags:")]
    return found


def test_nocache_is_what_it_is_in_qemu_nbd(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    random_disk(image, MIB)
    for options in (["-n"], ["--nocache"]):
        with nbdserve("-f", "raw", *options, image, directory=tmp_path) as server:
            assert any(number & os.O_DIRECT for number in _flags_of(server, image))


ZEROES: list[list[str]] = [
    ["--detect-zeroes=off"],
    ["--detect-zeroes=on"],
    ["--discard=unmap", "--detect-zeroes=unmap"],
]


@pytest.mark.parametrize("options", ZEROES, ids=["off", "on", "unmap"])
def test_writes_of_zeroes_become_what_they_become_in_qemu_nbd(tmp_path: Path, options: list[str]) -> None:
    left = []
    for name, serve in (("ours", nbdserve), ("theirs", qemu_nbd)):
        image = tmp_path / f"{name}.img"
        content = bytearray(random_disk(image, 4 * MIB))
        with serve("-f", "raw", *options, image, directory=tmp_path) as server:
            client = connected(server.uri())
            client.pwrite(bytes(MIB), MIB)
            client.pwrite(bytes(64 * KIB), 0, FUA)
            client.pwrite(bytes(MIB - 1) + b"!", 3 * MIB)
            client.pwrite(b"!" + bytes(4095), 2 * MIB)
            client.flush()
            client.shutdown()
            assert server.process.terminate() == 0
        content[MIB : 2 * MIB] = bytes(MIB)
        content[: 64 * KIB] = bytes(64 * KIB)
        content[3 * MIB :] = bytes(MIB - 1) + b"!"
        content[2 * MIB : 2 * MIB + 4096] = b"!" + bytes(4095)
        assert image.read_bytes() == content
        left.append(image.stat().st_blocks * 512)
    if len(options) == 2:
        assert max(left) < 3.5 * MIB, "nothing was given back"
    else:
        assert min(left) >= 4 * MIB


def test_zeroes_that_go_to_another_server_travel_as_such(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with (
        nbdkit("--filter=log", "memory", "4M", f"logfile={journal}", directory=tmp_path) as upstream,
        nbdserve("--detect-zeroes=unmap", upstream.uri(), directory=tmp_path) as proxy,
    ):
        client = connected(proxy.uri())
        client.pwrite(bytes(MIB), 0)
        client.shutdown()
        assert "...Zero" in journal.read_text()
        assert "...Write" not in journal.read_text()


@pytest.mark.parametrize("discard", ["ignore", "unmap"])
def test_discard_decides_whether_another_server_gives_space_back(tmp_path: Path, discard: str) -> None:
    journal = tmp_path / "journal"
    with (
        nbdkit("--filter=log", "memory", "4M", f"logfile={journal}", directory=tmp_path) as upstream,
        nbdserve(f"--discard={discard}", upstream.uri(), directory=tmp_path) as proxy,
    ):
        client = connected(proxy.uri())
        client.trim(MIB, 0)
        client.zero(MIB, 0)
        client.shutdown()
        said = journal.read_text()
        assert ("...Trim" in said) == (discard == "unmap")
        assert bool(re.search(r"Zero id=\d+ offset=0x0 count=0x100000 trim=1", said)) == (discard == "unmap")


@pytest.mark.parametrize("mode", ["writeback", "none"])
def test_a_block_device_is_served(tmp_path: Path, mode: str) -> None:
    image = tmp_path / "disk.img"
    size = 4 * MIB + 3 * 512
    content = bytearray(random_disk(image, size))
    with loop_device(image) as device:
        with nbdserve("-f", "raw", f"--cache={mode}", device, directory=tmp_path) as server:
            client = connected(server.uri())
            assert client.get_size() == size
            assert client.pread(size, 0) == content
            for offset, length in ((5, 1), (100, 70_000), (size - 700, 700)):
                content[offset : offset + length] = data = random_bytes(length, seed=offset)
                client.pwrite(data, offset)
            client.zero(64 * KIB, MIB)
            client.zero(1000, 2 * MIB + 7)
            content[MIB : MIB + 64 * KIB] = bytes(64 * KIB)
            content[2 * MIB + 7 : 2 * MIB + 1007] = bytes(1000)
            client.trim(64 * KIB, 3 * MIB)
            content[3 * MIB : 3 * MIB + 64 * KIB] = client.pread(64 * KIB, 3 * MIB)
            client.flush()
            with pytest.raises(nbd.Error) as refused:
                client.pwrite(b"x", size)
            assert refused.value.errnum == errno.ENOSPC
            assert client.pread(size, 0) == content
            client.shutdown()
            assert server.process.terminate() == 0
        check("blockdev", "--flushbufs", device)
    assert image.read_bytes() == content
