"""Images of QEMU's formats, served through a child of our own: what it does, and what becomes of it."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbd
import psutil
import pytest
from qemu.qmp import ExecuteError

from tests.support.disks import KIB, MIB, random_bytes, random_disk
from tests.support.monitors import monitor
from tests.support.processes import Argument, check, is_alive, run, wait_until
from tests.support.servers import NBDSERVE, Server, UnixAddress, nbdserve, qemu_nbd

SIZE = 8 * MIB


def make(path: Path, kind: str, *options: str) -> Path:
    """A new image of a format."""
    check("qemu-img", "create", "-f", kind, *options, path, str(SIZE))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A qcow2 image with nothing in it."""
    return make(tmp_path / "disk.qcow2", "qcow2")


def connected(uri: str) -> nbd.NBD:
    """A libnbd client."""
    client = nbd.NBD()
    client.add_meta_context("base:allocation")
    client.connect_uri(uri)
    return client


def child_of(server: Server) -> psutil.Process:
    """The qemu-nbd of a server."""
    found = [child for child in psutil.Process(server.pid).children() if child.name() == "qemu-nbd"]
    assert len(found) == 1
    return found[0]


def temporary_files() -> set[str]:
    """What lies in the directory for temporary files and is ours."""
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("nbdserve-")}


@pytest.mark.parametrize("kind", ["qcow2", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels", "qcow"])
def test_every_format_is_served_as_qemu_nbd_serves_it(tmp_path: Path, kind: str) -> None:
    image = make(tmp_path / "disk.img", kind)
    with nbdserve("-f", kind, image, directory=tmp_path) as server:
        client = connected(server.uri())
        size = client.get_size()
        content = bytearray(size)
        # Not every format takes writes.
        if not client.is_read_only():
            for offset, length in ((0, 70000), (3 * MIB + 5, 12345), (size - 4096, 4096)):
                content[offset : offset + length] = random_bytes(length, seed=offset)
                client.pwrite(content[offset : offset + length], offset)
            client.flush()
        client.shutdown()
        ours = [check("nbdinfo", "--map", server.uri()), check("nbdinfo", "--size", server.uri())]
        check("nbdcopy", server.uri(), tmp_path / "copy.img")
        assert server.process.terminate() == 0
    assert (tmp_path / "copy.img").read_bytes() == content
    with qemu_nbd("-r", "-f", kind, image, directory=tmp_path) as peer:
        assert [check("nbdinfo", "--map", peer.uri()), check("nbdinfo", "--size", peer.uri())] == ours
    if kind in ("qcow2", "qed", "vdi", "vhdx", "vmdk", "parallels"):
        check("qemu-img", "check", "-f", kind, image)


def test_where_the_data_of_a_chain_lies_is_told_as_by_qemu_nbd(tmp_path: Path) -> None:
    random_disk(tmp_path / "base.img", SIZE)
    make(tmp_path / "middle.qcow2", "qcow2", "-F", "raw", "-b", "base.img")
    image = make(tmp_path / "top.qcow2", "qcow2", "-F", "qcow2", "-b", "middle.qcow2")
    check("qemu-io", "-c", "write 1M 64k", tmp_path / "middle.qcow2")
    check("qemu-io", "-c", "write 3M 64k", image)
    with (
        nbdserve("-r", "-f", "qcow2", image, directory=tmp_path) as server,
        qemu_nbd("-r", "-A", "-f", "qcow2", image, directory=tmp_path) as peer,
    ):
        for context in ("base:allocation", "qemu:allocation-depth"):
            maps = [check("nbdinfo", f"--map={context}", uri) for uri in (server.uri(), peer.uri())]
            assert maps[0] == maps[1]
            assert len(maps[0].splitlines()) == (5 if "depth" in context else 1)


def test_formats_and_raw_images_stand_side_by_side(tmp_path: Path, image: Path) -> None:
    content = random_disk(tmp_path / "disk.img", MIB)
    exports = [f"--export=a={image},format=qcow2", f"--export=b={tmp_path}/disk.img,format=raw,read-only"]
    with nbdserve(*exports, f"--export=d={make(tmp_path / 'd.qed', 'qed')},format=qed,offset=1M,size=64K",
                  directory=tmp_path) as server:  # fmt: skip
        assert [check("nbdinfo", "--size", server.uri(name)) for name in "abd"] == [
            f"{SIZE}\n", f"{MIB}\n", f"{64 * KIB}\n",
        ]  # fmt: skip
        check("nbdcopy", server.uri("b"), tmp_path / "copy.img")
        assert (tmp_path / "copy.img").read_bytes() == content


def test_a_guest_disk_in_qcow2_stands_a_stock_workload(tmp_path: Path, image: Path) -> None:
    with nbdserve("-f", "qcow2", "--discard=unmap", image, directory=tmp_path) as server:
        job = ["--rw=randrw", "--bs=4k", "--iodepth=16", "--size=8m", "--number_ios=600", "--verify=crc32c"]
        check(
            "fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri()}", *job, "--verify_state_save=0"
        )
        check("mkfs.ext4", "-q", "-F", *_ext4_image(tmp_path))
        check("nbdcopy", tmp_path / "fs.img", server.uri())
        check("qemu-img", "compare", "-f", "raw", "-F", "raw", tmp_path / "fs.img", server.uri())
        assert server.process.terminate() == 0
    check("qemu-img", "check", image)
    check("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, tmp_path / "fs.img")


def _ext4_image(directory: Path) -> list[str]:
    with (directory / "fs.img").open("wb") as file:
        file.truncate(SIZE)
    return [str(directory / "fs.img")]


def test_the_child_and_its_files_go_with_the_server_however_it_ends(tmp_path: Path, image: Path) -> None:
    before = temporary_files()
    for end in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        with nbdserve("-f", "qcow2", image, directory=tmp_path) as server:
            child = child_of(server)
            assert temporary_files() == before
            server.process.signal(end)
            server.process.wait()
            _wait_for_the_end_of(child.pid)
    assert temporary_files() == before


def _wait_for_the_end_of(pid: int) -> None:
    wait_until(lambda: not is_alive(pid), "the child has ended")


def test_a_terminal_interrupt_is_for_the_server_alone(tmp_path: Path, image: Path) -> None:
    with nbdserve("-f", "qcow2", image, directory=tmp_path) as server:
        assert os.getpgid(child_of(server).pid) != os.getpgid(server.pid)


def test_a_child_that_dies_is_replaced_when_nothing_can_be_lost(tmp_path: Path, image: Path) -> None:
    with nbdserve("-f", "qcow2", image, directory=tmp_path) as server:
        client = connected(server.uri())
        client.pwrite(b"x" * 4096, 0)
        client.flush()
        for _ in range(2):
            child = child_of(server)
            child.kill()
            assert client.pread(4096, 0) == b"x" * 4096
            assert child_of(server).pid != child.pid
            client.pwrite(b"y" * 4096, 8192, nbd.CMD_FLAG_FUA)
        client.shutdown()
        server.process.wait_for_line("qemu-nbd ended with -9")
        server.process.wait_for_line("connected again")
        assert server.process.terminate() == 0
    check("qemu-img", "check", image)


def test_a_child_that_was_asked_to_end_has_lost_nothing(tmp_path: Path, image: Path) -> None:
    with nbdserve("-f", "qcow2", image, directory=tmp_path) as server:
        client = connected(server.uri())
        client.pwrite(b"x" * 4096, 0)
        child_of(server).terminate()
        assert client.pread(4096, 0) == b"x" * 4096
        client.flush()
        client.shutdown()


def test_a_child_that_dies_with_unflushed_writes_ends_the_export_and_serves_nothing_older(
    tmp_path: Path, image: Path
) -> None:
    with nbdserve("-f", "qcow2", image, directory=tmp_path) as server:
        client = connected(server.uri())
        client.pwrite(b"x" * 4096, 0)
        child_of(server).kill()
        requests: list[Callable[[], object]] = [
            lambda: client.pread(4096, 0),
            lambda: client.pwrite(b"z" * 512, 0),
            lambda: client.flush(),
            lambda: client.block_status(4096, 0, lambda *_: 0),
        ]
        for request in requests:
            with pytest.raises(nbd.Error) as failed:
                request()
            assert failed.value.errnum == errno.EIO
        client.shutdown()
        server.process.wait_for_line("acknowledged writes are lost")
        # The loss is in the exit code as well.
        assert server.process.terminate() == 1


def test_an_image_in_use_is_refused_in_qemus_words(tmp_path: Path, image: Path) -> None:
    with qemu_nbd("-f", "qcow2", image, directory=tmp_path):
        refused = run(NBDSERVE, "-f", "qcow2", "-k", tmp_path / "nbd.sock", image, seconds=20)
        assert refused.returncode == 1
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
        assert 'Failed to get "write" lock' in refused.stderr
        assert str(image) in refused.stderr
    with nbdserve("-f", "qcow2", image, directory=tmp_path):
        other = run("qemu-io", "-f", "qcow2", "-c", "write 0 512", image)
        assert 'Failed to get "write" lock' in other.stderr


def test_a_fence_keeps_writers_away_from_a_formatted_image(tmp_path: Path, image: Path) -> None:
    write: list[Argument] = ["qemu-io", "-f", "raw", "-c", "write 64k 512", image]
    with nbdserve("-f", "qcow2", "-r", "--fence", image, directory=tmp_path) as server:
        # Also when the child, whose own locks do so too, is gone.
        child_of(server).kill()
        refused = run(*write)
        assert 'Failed to get "write" lock' in refused.stderr
        check("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512", image)
    check(*write)


def test_the_options_that_qemu_nbd_knows_reach_it(tmp_path: Path, image: Path) -> None:
    options = ["--cache=writethrough", "--aio=threads", "--detect-zeroes=unmap", "--discard=unmap", "-r"]
    with nbdserve("-f", "qcow2", *options, image, directory=tmp_path) as server:
        line = child_of(server).cmdline()
        for option in (*options[:-1], "--read-only", "--format=qcow2"):
            assert option in line
        assert connected(server.uri()).is_read_only()


def test_what_qemu_nbd_cannot_open_is_one_line(tmp_path: Path) -> None:
    make(tmp_path / "top.qcow2", "qcow2", "-F", "raw", "-b", str(random_image(tmp_path / "base.img")))
    (tmp_path / "base.img").unlink()
    refused = run(NBDSERVE, "-f", "qcow2", "-k", tmp_path / "nbd.sock", tmp_path / "top.qcow2", seconds=20)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1, refused.stderr
    assert "base.img" in refused.stderr


def random_image(path: Path) -> Path:
    """A raw image."""
    random_disk(path, SIZE)
    return path


def test_without_qemu_nbd_its_package_is_named(tmp_path: Path, image: Path) -> None:
    (tmp_path / "setpriv").symlink_to("/usr/bin/setpriv")
    refused = run(
        NBDSERVE, "-f", "qcow2", "-k", tmp_path / "nbd.sock", image, env={"PATH": str(tmp_path)}, seconds=20
    )
    assert refused.returncode == 1
    assert refused.stderr == f"nbdserve: {image}: to serve qcow2 images takes qemu-nbd: install qemu-utils\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_server_that_dropped_its_rights_ends_with_its_child(tmp_path: Path, image: Path) -> None:
    with nbdserve("-f", "qcow2", "--user=nobody", image, directory=tmp_path) as server:
        child = child_of(server)
        client = connected(server.uri())
        client.pwrite(b"x" * 512, 0)
        client.shutdown()
        assert server.process.terminate() == 0
        assert not is_alive(child.pid)
    check("qemu-io", "-r", "-c", "read -P 0x78 0 512", image)


def test_a_daemon_keeps_its_child(tmp_path: Path, image: Path) -> None:
    address, pid_file = UnixAddress(tmp_path / "nbd.sock"), tmp_path / "nbd.pid"
    check(NBDSERVE, "-f", "qcow2", "-k", address.path, "--fork", "--pid-file", pid_file, image)
    pid = int(pid_file.read_text())
    try:
        client = connected(address.uri())
        client.pwrite(b"daemon", 0)
        client.shutdown()
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not is_alive(pid), "the daemon has ended")
    check("qemu-io", "-r", "-c", "read -P 0x64 0 1", image)


def test_a_daemon_reports_a_bad_image_and_its_kind_of_error(tmp_path: Path, image: Path) -> None:
    options: list[Argument] = ["-k", tmp_path / "nbd.sock", "--fork"]
    failed = run(NBDSERVE, "-f", "qed", *options, image, seconds=20)
    assert (failed.returncode, len(failed.stderr.splitlines())) == (1, 1)
    misused = run(NBDSERVE, "-f", "raw", "-o", str(1 << 40), *options, image, seconds=20)
    assert (misused.returncode, len(misused.stderr.splitlines())) == (2, 1)


def test_formats_and_other_servers_are_added_and_removed_through_the_monitor(
    tmp_path: Path, image: Path
) -> None:
    content = random_disk(tmp_path / "disk.img", MIB)
    options = [f"--export=disk={tmp_path}/disk.img,format=raw", f"--qmp=unix:{tmp_path}/qmp.sock"]
    with nbdserve(*options, directory=tmp_path) as server, monitor(tmp_path / "qmp.sock") as qmp:
        added: dict[str, object] = {"type_": "nbd", "writable": True}
        qmp.execute("block-export-add", id_="q", filename=str(image), format_="qcow2", **added)
        qmp.execute("block-export-add", id_="p", filename=server.uri("disk"), offset=4096, size=512, **added)
        assert connected(server.uri("p")).pread(512, 0) == content[4096:4608]
        client = connected(server.uri("q"))
        client.pwrite(b"x" * 512, 0)
        client.shutdown()
        child = child_of(server)
        qmp.execute("block-export-del", id_="q", mode="hard")
        _wait_for_the_end_of(child.pid)
        check("qemu-io", "-c", "read -P 0x78 0 512", image)
        for wrong in ({"filename": str(image), "format_": "qed"}, {"filename": "nbd://127.0.0.1:1"}):
            with pytest.raises(ExecuteError):
                qmp.execute("block-export-add", id_="w", type_="nbd", **wrong)
        qmp.execute("block-export-del", id_="p", mode="hard")
