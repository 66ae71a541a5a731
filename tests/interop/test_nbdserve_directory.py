"""A directory as a set of exports: its files come, go and change, and nothing else can be reached."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import nbd
import psutil
import pytest

from tests.support.disks import KIB, MIB, random_disk
from tests.support.processes import Argument, check, run, wait_until
from tests.support.servers import NBDSERVE, Server, nbdserve
from tests.support.wire import Option, Reply, Wire, export_query


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with two images and a number of things that are none."""
    top = tmp_path / "images"
    top.mkdir()
    random_disk(top / "first.img", MIB, seed=1)
    random_disk(top / "second disk", 64 * KIB + 1, seed=2)
    random_disk(top / ".hidden", 4096)
    random_disk(tmp_path / "secret", 4096)
    (top / "link").symlink_to(tmp_path / "secret")
    (top / "inside").symlink_to("first.img")
    (top / "below").mkdir()
    random_disk(top / "below" / "deep.img", 4096)
    os.mkfifo(top / "pipe")
    return top


@pytest.fixture
def server(directory: Path, tmp_path: Path) -> Iterator[Server]:
    """A writable server of the directory."""
    with nbdserve("--directory", directory, directory=tmp_path) as running:
        yield running


def connected(uri: str) -> nbd.NBD:
    """A libnbd client."""
    client = nbd.NBD()
    client.connect_uri(uri)
    return client


def listed(server: Server) -> dict[str, int]:
    """The exports that a client sees, with their sizes in bytes."""
    told = json.loads(check("nbdinfo", "--list", "--json", server.uri()))["exports"]
    return {export["export-name"]: export["export-size"] for export in told}


def test_regular_files_are_listed_and_served_by_their_names(
    server: Server, directory: Path, tmp_path: Path
) -> None:
    assert listed(server) == {"first.img": MIB, "second disk": 64 * KIB + 1}
    for name in listed(server):
        check("nbdcopy", server.uri(name), tmp_path / "copy.img")
        assert (tmp_path / "copy.img").read_bytes() == (directory / name).read_bytes()


def test_files_come_go_and_change_while_it_runs(server: Server, directory: Path, tmp_path: Path) -> None:
    new = random_disk(directory / "third", 12345)
    assert listed(server)["third"] == 12345
    check("nbdcopy", server.uri("third"), tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == new
    with (directory / "third").open("ab") as file:
        file.write(b"more")
    assert check("nbdinfo", "--size", server.uri("third")) == "12349\n"
    (directory / "third").unlink()
    assert "third" not in listed(server)
    assert run("nbdinfo", "--size", server.uri("third")).returncode == 1


NAMES = [
    "", ".", "..", "../secret", "/etc/passwd", "below", "below/deep.img", "./first.img", "first.img/", "link",
    "inside", "pipe", ".hidden", "FIRST.IMG", "first.img ", "nope", "x" * 300, "\N{SNOWMAN}",
    "images/first.img", "*", "first*",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_its_files_can_be_reached(server: Server, name: str) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        for option in (Option.INFO, Option.GO):
            assert wire.haggle(option, export_query(name))[-1].kind == Reply.ERR_UNKNOWN
        assert wire.haggle(Option.GO, export_query("first.img"))[-1].kind == Reply.ACK


def test_a_file_is_open_only_while_it_is_used(server: Server, directory: Path) -> None:
    process = psutil.Process(server.pid)

    def opened() -> list[str]:
        return [file.path for file in process.open_files() if file.path.startswith(str(directory))]

    listed(server)
    assert opened() == []
    first, second = connected(server.uri("first.img")), connected(server.uri("first.img"))
    wait_until(lambda: opened() == [str(directory / "first.img")], "the file is open")
    first.pwrite(b"seen by both", 0)
    assert second.pread(12, 0) == b"seen by both"
    assert first.can_multi_conn()
    first.shutdown()
    assert opened() == [str(directory / "first.img")]
    second.shutdown()
    wait_until(lambda: opened() == [], "the file is closed")


def test_clients_that_come_and_go_all_the_time_are_all_served(server: Server, directory: Path) -> None:
    failures: list[object] = []

    def work(seed: int) -> None:
        for turn in range(25):
            client = connected(server.uri("first.img"))
            offset = seed * 4096
            data = bytes([seed, turn]) * 2048
            client.pwrite(data, offset)
            if client.pread(4096, offset) != data:
                failures.append((seed, turn))
            client.shutdown()

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    content = (directory / "first.img").read_bytes()
    assert all(content[seed * 4096 :][:4096] == bytes([seed, 24]) * 2048 for seed in range(4))


def test_what_looks_like_another_format_is_not_served_unless_raw_is_asked_for(
    directory: Path, tmp_path: Path
) -> None:
    check("qemu-img", "create", "-f", "qcow2", directory / "disk.qcow2", "1M")
    with nbdserve("--directory", directory, directory=tmp_path) as server:
        assert "disk.qcow2" not in listed(server)
        assert "disk.qcow2: looks like a qcow2 image" in server.log.read_text()
    with nbdserve("--directory", directory, "-f", "raw", directory=tmp_path) as server:
        assert connected(server.uri("disk.qcow2")).pread(4, 0) == b"QFI\xfb"


def test_an_image_that_somebody_keeps_from_being_written_is_refused(
    server: Server, directory: Path, tmp_path: Path
) -> None:
    with nbdserve("-f", "raw", "-r", "--fence", directory / "first.img", directory=tmp_path):
        assert run("nbdcopy", server.uri("first.img"), "null:").returncode == 1
        server.process.wait_for_line("first.img: the image is in use")
        assert check("nbdinfo", "--size", server.uri("second disk")) == f"{64 * KIB + 1}\n"
    check("nbdcopy", server.uri("first.img"), "null:")


def test_read_only_and_named_exports_go_with_it(directory: Path, tmp_path: Path) -> None:
    named = random_disk(tmp_path / "named.img", 512)
    options: list[Argument] = [
        "-r",
        "--directory",
        directory,
        f"--export=first.img={tmp_path}/named.img,format=raw",
    ]
    with nbdserve(*options, directory=tmp_path) as server:
        assert listed(server) == {"first.img": 512, "second disk": 64 * KIB + 1}
        assert connected(server.uri("first.img")).pread(512, 0) == named
        client = connected(server.uri("second disk"))
        assert client.is_read_only()
        client.shutdown()


def test_a_directory_that_is_none_is_one_line(tmp_path: Path) -> None:
    random_disk(tmp_path / "disk.img", 512)
    for wrong, code in (("missing", 1), ("disk.img", 1)):
        done = run(NBDSERVE, "-k", tmp_path / "nbd.sock", "--directory", tmp_path / wrong, seconds=10)
        assert (done.returncode, len(done.stderr.splitlines())) == (code, 1), done.stderr
        assert wrong in done.stderr
    for options in (["-f", "qcow2"], ["-x", "name"], ["-o", "512"], ["--fence"]):
        done = run(NBDSERVE, "-k", tmp_path / "nbd.sock", "--directory", tmp_path, *options, seconds=10)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
