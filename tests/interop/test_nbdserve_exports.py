"""What is exported: names, sizes exact to the byte, parts of files, holes, and what may be written."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import nbd
import pytest

from tests.support.disks import KIB, MIB, ODD_SIZE, Run, random_disk, sparse_disk, sparse_runs
from tests.support.processes import check, run
from tests.support.servers import nbdserve
from tests.support.wire import Option, Reply, Wire, export_query, option

TIB = 1 << 40


def connected(uri: str) -> nbd.NBD:
    """A libnbd client that sends whatever it is asked to, also what the server will refuse."""
    client = nbd.NBD()
    client.set_strict_mode(0)
    client.add_meta_context("base:allocation")
    client.connect_uri(uri)
    return client


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4097, 65535, ODD_SIZE, TIB, TIB + 1])
def test_a_size_is_exact_to_the_byte(tmp_path: Path, size: int) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(size)
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        client = connected(server.uri())
        assert client.get_size() == size
        if size:
            client.pwrite(b"!", size - 1)
            assert client.pread(1, size - 1) == b"!"
        with pytest.raises(nbd.Error) as refused:
            client.pread(1, size)
        assert refused.value.errnum == errno.EINVAL
        with pytest.raises(nbd.Error) as refused:
            client.pwrite(b"!", size)
        assert refused.value.errnum == errno.ENOSPC
        client.shutdown()
    assert image.stat().st_size == size


def test_several_exports_are_listed_and_each_is_its_own_disk(tmp_path: Path) -> None:
    names = ["first", "with space", "größe", "a/b?c", "a=b", "=", "a==b=", "x,y=z"]
    contents = [
        random_disk(tmp_path / f"{number}.img", 64 * KIB + number, seed=number)
        for number in range(len(names))
    ]
    options = []
    for number, name in enumerate(names):
        attributes = "format=raw,description=Disk number " + str(number)
        written = name.replace("=", "==")
        options += ["--export", f"{written}={tmp_path}/{number}.img,{attributes}"]
    with nbdserve(*options, directory=tmp_path) as server:
        told = json.loads(check("nbdinfo", "--list", "--json", server.uri()))["exports"]
        assert [export["export-name"] for export in told] == names
        assert [export["description"] for export in told] == [f"Disk number {n}" for n in range(len(names))]
        for number, name in enumerate(names):
            check("nbdcopy", server.uri(name), tmp_path / "copy.img")
            assert (tmp_path / "copy.img").read_bytes() == contents[number]


def test_an_unknown_export_is_refused_and_the_client_may_choose_another(tmp_path: Path) -> None:
    random_disk(tmp_path / "disk.img", 64 * KIB)
    with nbdserve("-f", "raw", "-x", "disk", tmp_path / "disk.img", directory=tmp_path) as server:
        for name in ("", "nope", "disk2", "dis"):
            refused = run("nbdinfo", server.uri(name))
            assert refused.returncode == 1
            assert "No such file or directory" in refused.stderr
        with Wire(server.address) as wire:
            wire.greet()
            for name in ("", "nope"):
                assert wire.haggle(Option.GO, export_query(name))[-1].kind == Reply.ERR_UNKNOWN
            assert wire.haggle(Option.GO, export_query("disk"))[-1].kind == Reply.ACK


def test_a_client_that_can_only_export_name_is_cut_off_when_the_name_is_unknown(tmp_path: Path) -> None:
    random_disk(tmp_path / "disk.img", 64 * KIB)
    with nbdserve("-f", "raw", "-x", "disk", tmp_path / "disk.img", directory=tmp_path) as server:
        for name, known in ((b"nope", False), (b"disk", True)):
            with Wire(server.address) as wire:
                wire.greet(flags=1)
                wire.send(option(Option.EXPORT_NAME, name))
                if known:
                    answer = wire.receive(8 + 2 + 124)  # size, transmission flags, zeroes
                    assert int.from_bytes(answer[:8]) == 64 * KIB
                else:
                    assert wire.is_closed_by_server()


CHANGES: dict[str, Callable[[nbd.NBD], object]] = {
    "write": lambda client: client.pwrite(b"x" * 512, 0),
    "write with FUA": lambda client: client.pwrite(b"x" * 512, 0, nbd.CMD_FLAG_FUA),
    "long write": lambda client: client.pwrite(b"x" * MIB, 0),
    "zero": lambda client: client.zero(512, 0),
    "trim": lambda client: client.trim(4096, 0),
}


def test_a_read_only_export_refuses_every_change_and_goes_on_reading(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    content = random_disk(image, 2 * MIB)
    image.chmod(0o444)
    with nbdserve("-f", "raw", "-r", image, directory=tmp_path) as server:
        client = connected(server.uri())
        assert client.is_read_only()
        for what, change in CHANGES.items():
            with pytest.raises(nbd.Error) as refused:
                change(client)
            assert refused.value.errnum == errno.EPERM, what
            assert client.pread(2 * MIB, 0) == content
        client.flush()
        client.shutdown()
        refused_open = run("qemu-io", "-f", "raw", "-c", "write 0 512", server.uri())
        assert refused_open.returncode == 1
        check("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", server.uri())
    assert image.read_bytes() == content


def test_the_same_image_can_be_exported_writable_and_read_only(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    random_disk(image, 64 * KIB)
    options = ["--export", f"rw={image},format=raw", "--export", f"ro={image},format=raw,read-only"]
    with nbdserve(*options, directory=tmp_path) as server:
        writer, reader = connected(server.uri("rw")), connected(server.uri("ro"))
        writer.pwrite(b"seen by both", 100)
        assert reader.pread(12, 100) == b"seen by both"
        with pytest.raises(nbd.Error):
            reader.pwrite(b"no", 0)
        writer.shutdown()
        reader.shutdown()


@pytest.mark.parametrize("offset", [1, 512, 1 * MIB + 1])
def test_an_offset_serves_the_rest_of_the_file(tmp_path: Path, offset: int) -> None:
    image = tmp_path / "disk.img"
    content = bytearray(random_disk(image, ODD_SIZE))
    with nbdserve("-f", "raw", "-o", str(offset), image, directory=tmp_path) as server:
        check("nbdcopy", server.uri(), tmp_path / "copy.img")
        assert (tmp_path / "copy.img").read_bytes() == content[offset:]
        client = connected(server.uri())
        client.pwrite(b"here", 0)
        client.zero(8192, 4096)
        client.shutdown()
    content[offset : offset + 4] = b"here"
    content[offset + 4096 : offset + 12288] = bytes(8192)
    assert image.read_bytes() == content


def extents_by_nbdinfo(uri: str) -> list[Run]:
    """The map of an export, neighbours of one kind joined."""
    told = json.loads(check("nbdinfo", "--map", "--json", uri))
    return joined([Run(extent["offset"], extent["length"], extent["type"] == 0) for extent in told])


def extents_by_qemu_img(source: str | Path, size: int) -> list[Run]:
    """The map of a file or an export; QEMU rounds the size up to a sector."""
    told = json.loads(check("qemu-img", "map", "--output=json", "-f", "raw", str(source)))
    return joined(
        [
            Run(part["start"], min(part["length"], size - part["start"]), part["data"])
            for part in told
            if part["start"] < size
        ]
    )


def joined(runs: list[Run]) -> list[Run]:
    """The same runs with neighbours of one kind as one."""
    result: list[Run] = []
    for following in runs:
        if result and result[-1].data == following.data:
            last = result.pop()
            following = Run(last.offset, last.length + following.length, last.data)
        result.append(following)
    return result


@pytest.mark.parametrize(("size", "grain"), [(ODD_SIZE, 64 * KIB), (40 * MIB, 4 * KIB), (1 * MIB, 1 * MIB)])
def test_holes_are_told_exactly_where_the_file_has_them(tmp_path: Path, size: int, grain: int) -> None:
    image = tmp_path / "disk.img"
    runs = sparse_runs(size, grain)
    sparse_disk(image, runs)
    assert extents_by_qemu_img(image, size) == runs
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        assert extents_by_nbdinfo(server.uri()) == runs
        assert extents_by_qemu_img(server.uri(), size) == runs


def test_the_map_of_a_terabyte_of_nothing_is_one_hole(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    sparse_disk(image, [Run(0, 64 * KIB, True), Run(64 * KIB, 64 * KIB, False)])
    with image.open("r+b") as file:
        file.truncate(TIB)
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        assert extents_by_nbdinfo(server.uri()) == [
            Run(0, 64 * KIB, True),
            Run(64 * KIB, TIB - 64 * KIB, False),
        ]


@pytest.mark.parametrize(("discard", "punched"), [("unmap", True), ("ignore", False)])
def test_a_trim_gives_space_back_unless_discards_are_ignored(
    tmp_path: Path, discard: str, punched: bool
) -> None:
    image = tmp_path / "disk.img"
    content = random_disk(image, 1 * MIB)
    with nbdserve("-f", "raw", f"--discard={discard}", image, directory=tmp_path) as server:
        client = connected(server.uri())
        client.trim(512 * KIB, 256 * KIB)
        client.shutdown()
        hole = [Run(256 * KIB, 512 * KIB, False)] if punched else []
        assert [run for run in extents_by_nbdinfo(server.uri()) if not run.data] == hole
    if not punched:
        assert image.read_bytes() == content


@pytest.mark.parametrize(("flags", "punched"), [(0, True), (nbd.CMD_FLAG_NO_HOLE, False)])
def test_zeroes_are_a_hole_unless_the_client_wants_none(tmp_path: Path, flags: int, punched: bool) -> None:
    image = tmp_path / "disk.img"
    content = bytearray(random_disk(image, 1 * MIB))
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        client = connected(server.uri())
        client.zero(512 * KIB, 256 * KIB, flags)
        client.shutdown()
    content[256 * KIB : 768 * KIB] = bytes(512 * KIB)
    assert image.read_bytes() == content
    assert (image.stat().st_blocks * 512 < 1 * MIB) is punched
