"""nbdserve before another NBD server: what it takes over and passes on."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import nbd
import pytest
from qemu.qmp import ExecuteError

from nbdserve.common.uri import parse_uri
from nbdserve.monitor.dirty_bitmap import DirtyRanges, read_dirty_bitmap
from tests.support.disks import KIB, MIB, ODD_SIZE, random_disk, sparse_disk, sparse_runs
from tests.support.monitors import monitor
from tests.support.processes import Argument, check, is_alive, wait_until
from tests.support.servers import NBDSERVE, Server, UnixAddress, nbdkit, nbdserve, qemu_nbd
from tests.support.tls import Identities
from tests.support.wire import Command, Wire, request


def connected(uri: str, *contexts: str) -> nbd.NBD:
    """A libnbd client that also sends what the server will refuse."""
    client = nbd.NBD()
    client.set_strict_mode(0)
    for context in contexts:
        client.add_meta_context(context)
    client.connect_uri(uri)
    return client


def described(uri: str) -> dict[str, object]:
    """What nbdinfo says of an export, but for its address."""
    told = json.loads(check("nbdinfo", "--json", uri))["exports"][0]
    return {key: value for key, value in told.items() if key != "uri"}


def test_everything_reads_and_writes_through_it(tmp_path: Path) -> None:
    near, far = tmp_path / "near.img", tmp_path / "far.img"
    content = random_disk(far, ODD_SIZE)
    new = random_disk(near, ODD_SIZE, seed=2)
    with (
        nbdserve("-f", "raw", far, directory=tmp_path) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
    ):
        check("nbdcopy", proxy.uri(), tmp_path / "copy.img")
        assert (tmp_path / "copy.img").read_bytes() == content
        check("nbdcopy", "--connections=4", "--requests=16", near, proxy.uri())
        assert far.read_bytes() == new
        check("qemu-img", "compare", "-f", "raw", "-F", "raw", upstream.uri(), proxy.uri())
        job = [
            "--rw=randrw",
            "--bs=4k",
            "--iodepth=16",
            "--size=2m",
            "--number_ios=400",
            "--verify=crc32c",
            "--verify_state_save=0",
        ]
        check("fio", "--name=verify", "--ioengine=nbd", f"--uri={proxy.uri()}", *job)
        assert proxy.process.terminate() == 0


UPSTREAMS = {
    "nbdserve": ["-f", "raw"],
    "nbdserve read-only": ["-f", "raw", "-r"],
    "qemu-nbd": ["-f", "raw", "--allocation-depth"],
    "qemu-nbd read-only": ["-f", "raw", "-r"],
    "nbdkit file": ["file"],
    "nbdkit without much": ["--no-sr", "--filter=nozero", "--filter=nocache", "file"],
    "nbdkit with large blocks": ["--filter=blocksize-policy", "file", "blocksize-minimum=4096",
                                 "blocksize-preferred=65536", "blocksize-maximum=1M"],
}  # fmt: skip


Starter = Callable[..., AbstractContextManager[Server]]


@contextmanager
def upstream_of(kind: str, image: Path, directory: Path) -> Iterator[Server]:
    """One of the servers above."""
    program, options = kind.split()[0], UPSTREAMS[kind]
    starters: dict[str, Starter] = {"nbdserve": nbdserve, "qemu-nbd": qemu_nbd, "nbdkit": nbdkit}
    with starters[program](*options, image, directory=directory) as server:
        yield server


@pytest.mark.parametrize("kind", UPSTREAMS)
def test_what_the_server_can_do_is_taken_over(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "disk.img"
    content = sparse_disk(image, sparse_runs(4 * MIB))
    with (
        upstream_of(kind, image, tmp_path) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
    ):
        theirs, ours = described(upstream.uri()), described(proxy.uri())
        # One upstream connection, or several that see one another's writes: always true here.
        assert ours.pop("can_multi_conn")
        theirs.pop("can_multi_conn")
        # Replies are framed, and long requests cut up, by this server.
        for own in ("can_df", "can_block_status_payload", "block_size_maximum"):
            ours.pop(own, None)
            theirs.pop(own, None)
        if "block_size_minimum" not in theirs:
            assert (ours.pop("block_size_minimum"), ours.pop("block_size_preferred")) == (1, 4096)
        if not ours["contexts"]:
            # Without structured replies nbdkit 1.42 lists a context, which nobody can select.
            theirs["contexts"] = []
        assert ours == theirs
        check("nbdcopy", proxy.uri(), tmp_path / "copy.img")
        assert (tmp_path / "copy.img").read_bytes() == content
        if "contexts" in theirs:
            for context in ("base:allocation", "qemu:allocation-depth"):
                if context in str(theirs["contexts"]):
                    told = [
                        check("nbdinfo", f"--map={context}", "--json", uri)
                        for uri in (upstream.uri(), proxy.uri())
                    ]
                    assert told[0] == told[1]


@pytest.mark.parametrize("rotates", [True, False])
def test_whether_the_disk_rotates_is_known_from_the_server_only(tmp_path: Path, rotates: bool) -> None:
    """Of a file it is not told: what is in the page cache does not rotate, whatever lies below."""
    answer = f"is_rotational=exit {0 if rotates else 3}"
    plugin: list[Argument] = ["eval", "get_size=echo 1M", "pread=head -c $3 /dev/zero", answer]
    with (
        nbdkit(*plugin, directory=tmp_path) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
    ):
        assert described(proxy.uri())["is_rotational"] is rotates


def test_requests_that_do_not_fit_the_servers_blocks_are_refused_here(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    random_disk(image, MIB)
    with (
        upstream_of("nbdkit with large blocks", image, tmp_path) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
        Wire(proxy.address) as wire,
    ):
        wire.go(structured=True)
        for command in (Command.READ, Command.WRITE, Command.WRITE_ZEROES, Command.TRIM):
            for offset, length in ((512, 4096), (4096, 512)):
                data = bytes(length) if command == Command.WRITE else b""
                wire.send(request(command, offset, length, data=data))
                (refused,) = wire.chunks()
                assert refused.error == errno.EINVAL
                assert "no multiples of 4096" in refused.message
        wire.send(request(Command.READ, 4096, 4096))
        assert wire.chunks()[-1].error == 0


def test_dirty_bitmaps_of_the_server_can_be_read_here(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    check("qemu-img", "create", "-f", "qcow2", image, "4M")
    check("qemu-img", "bitmap", "--add", "-g", "64K", image, "b0")
    check("qemu-io", "-c", "write 1M 64K", image)
    with (
        qemu_nbd("-r", "-f", "qcow2", "--bitmap=b0", image, directory=tmp_path) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
    ):
        maps = [check("nbdinfo", "--map=qemu:dirty-bitmap:b0", uri) for uri in (upstream.uri(), proxy.uri())]
        assert maps[0] == maps[1]
        assert "dirty" in maps[1]


def test_a_server_s_dirty_bitmap_is_told_by_the_monitor_and_in_parts_where_it_is_long(tmp_path: Path) -> None:
    image, block = tmp_path / "disk.qcow2", 64 << 10
    check("qemu-img", "create", "-f", "qcow2", image, "4M")
    check("qemu-img", "bitmap", "--add", "-g", "64K", image, "b0")
    places = [block, 3 * block, 4 * block, 9 * block, 63 * block]
    check("qemu-io", *(word for each in places for word in ("-c", f"write {each} {block}")), image)
    dirty = [(block, block), (3 * block, 2 * block), (9 * block, block), (63 * block, block)]
    with (
        qemu_nbd("-r", "-f", "qcow2", "--bitmap=b0", image, directory=tmp_path) as upstream,
        nbdserve("--qmp", f"unix:{tmp_path / 'qmp'}", "-f", "qcow2", "-r", image, directory=tmp_path),
        monitor(tmp_path / "qmp") as qmp,
    ):
        asked = {"filename": str(upstream.uri()), "bitmap": "b0"}
        ranges = [list(each) for each in dirty]
        answer = qmp.execute("x-query-dirty-bitmap", **asked)
        assert answer == {"size": 4 * MIB, "ranges": ranges, "next": None}
        answer = qmp.execute("x-query-dirty-bitmap", **asked, offset=5 * block)
        assert answer == {"size": 4 * MIB, "ranges": ranges[2:], "next": None}
        with pytest.raises(ExecuteError, match="no dirty bitmap b1 is exported there"):
            qmp.execute("x-query-dirty-bitmap", filename=asked["filename"], bitmap="b1")
        with pytest.raises(ExecuteError, match="an offset is 0 or more bytes"):
            qmp.execute("x-query-dirty-bitmap", **asked, offset=-1)
        uri = parse_uri(asked["filename"])
        assert read_dirty_bitmap(uri, "b0", most=4) == DirtyRanges(4 * MIB, dirty, None)
        told: list[tuple[int, int]] = []
        place: int | None = 0
        while place is not None:
            part = read_dirty_bitmap(uri, "b0", place, 1)
            assert len(part.ranges) == 1
            told, place = told + part.ranges, part.end
        assert told == dirty


def test_flush_fua_zero_trim_and_cache_reach_the_server(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    disk = ["--filter=log", "--filter=fua", "memory", "4M", f"logfile={journal}", "fuamode=native"]
    with (
        nbdkit(*disk, directory=tmp_path) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
    ):
        client = connected(proxy.uri())
        client.pwrite(b"x" * 512, 1024, nbd.CMD_FLAG_FUA)
        client.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)
        client.zero(4096, 16384, nbd.CMD_FLAG_FUA)
        client.trim(4096, 65536)
        client.flush()
        client.shutdown()
        done = re.findall(r"(Write|Zero|Trim|Flush) id=\d+ (.*?) ?\.\.\.", journal.read_text())
    assert done == [
        ("Write", "offset=0x400 count=0x200 fua=1"),
        ("Zero", "offset=0x2000 count=0x1000 trim=0 fua=0 fast=0"),
        ("Zero", "offset=0x4000 count=0x1000 trim=1 fua=1 fast=0"),
        ("Trim", "offset=0x10000 count=0x1000 fua=0"),
        ("Flush", ""),
    ]


def test_long_requests_and_requests_for_nothing_are_served(tmp_path: Path) -> None:
    with (
        nbdkit("memory", "9T", directory=tmp_path) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
    ):
        client = connected(proxy.uri(), "base:allocation")
        data = os.urandom(32 * MIB)
        client.pwrite(data, 5)
        assert client.pread(32 * MIB, 5) == data
        client.pwrite(data + data, 40 * MIB)
        client.zero(3 << 30, 0)
        client.trim(3 << 30, 1 << 40)
        assert client.pread(512, 5) == bytes(512)
        found: list[int] = []

        def collect(context: str, offset: int, entries: list[int], error: object) -> int:
            found.extend(entries)
            return 0

        client.block_status((1 << 32) - 4096, 0, collect)
        assert sum(found[::2]) >= 1 << 30
        client.zero(0, 0)
        client.trim(0, 0)
        client.shutdown()


def test_a_slice_of_an_export_is_served(tmp_path: Path) -> None:
    content = bytearray(random_disk(tmp_path / "disk.img", 2 * MIB))
    with nbdserve("-f", "raw", tmp_path / "disk.img", directory=tmp_path) as upstream:
        uri = upstream.uri().replace(",", ",,")
        options = [f"--export=part={uri},offset=1000,size=100K", f"--export=rest={uri},offset=1M,read-only"]
        with nbdserve(*options, directory=tmp_path) as proxy:
            assert check("nbdinfo", "--size", proxy.uri("rest")) == f"{MIB}\n"
            client = connected(proxy.uri("part"), "base:allocation")
            assert client.get_size() == 100 * KIB
            assert client.pread(100 * KIB, 0) == content[1000 : 1000 + 100 * KIB]
            client.pwrite(b"here", 7)
            client.block_status(100 * KIB, 0, lambda name, offset, entries, error: 0)
            client.shutdown()
            check("nbdcopy", proxy.uri("rest"), tmp_path / "copy.img")
            assert (tmp_path / "copy.img").read_bytes() == content[MIB:]
    content[1007:1011] = b"here"
    assert (tmp_path / "disk.img").read_bytes() == content


@pytest.mark.parametrize("structured", [True, False])
def test_an_error_of_the_server_is_the_same_error_here(tmp_path: Path, structured: bool) -> None:
    failing = ["error-pread=EIO", "error-pwrite=ENOSPC", "error-trim=EPERM", "error-extents=ENOMEM"]
    rates = [f"error-{what}-rate=100%" for what in ("pread", "pwrite", "trim", "extents")]
    with (
        nbdkit("--filter=error", "memory", "4M", *failing, *rates, directory=tmp_path) as upstream,
        nbdserve(upstream.uri(), directory=tmp_path) as proxy,
    ):
        client = nbd.NBD()
        client.set_request_structured_replies(structured)
        client.add_meta_context("base:allocation")
        client.connect_uri(proxy.uri())
        expected: list[tuple[Callable[[], object], int]] = [
            (lambda: client.pread(512, 0), errno.EIO),
            (lambda: client.pread(2 * MIB, 0), errno.EIO),
            (lambda: client.pwrite(b"x" * 512, 0), errno.ENOSPC),
            (lambda: client.trim(512, 0), errno.EPERM),
        ]
        if structured:
            expected.append((lambda: client.block_status(MIB, 0, lambda *_: 0), errno.ENOMEM))
        for request, number in expected:
            with pytest.raises(nbd.Error) as failed:
                request()
            assert failed.value.errnum == number
        client.shutdown()


def test_a_server_behind_tls_is_reached(tmp_path: Path, identities: Identities) -> None:
    content = random_disk(tmp_path / "disk.img", MIB)
    tls = [f"--tls-certificates={identities.server}", "--tls-require"]
    with nbdserve("-f", "raw", *tls, tmp_path / "disk.img", directory=tmp_path) as upstream:
        uri = upstream.uri().replace("nbd+unix", "nbds+unix")
        with nbdserve(
            f"{uri}&tls-verify-peer=0&tls-certificates={identities.client}", directory=tmp_path
        ) as proxy:
            check("nbdcopy", proxy.uri(), tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == content


def test_it_goes_to_the_background(tmp_path: Path) -> None:
    address, pid_file = UnixAddress(tmp_path / "proxy.sock"), tmp_path / "proxy.pid"
    with nbdkit("memory", "1M", directory=tmp_path) as upstream:
        check(NBDSERVE, "-k", address.path, "--fork", "--pid-file", pid_file, upstream.uri())
        pid = int(pid_file.read_text())
        try:
            client = connected(address.uri())
            client.pwrite(b"daemon", 0)
            assert client.pread(6, 0) == b"daemon"
            client.shutdown()
        finally:
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not is_alive(pid), "the daemon has ended")
