"""Images that our code made and wrote: QEMU opens, checks, compares and goes on with them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdserve.common.errors import UsageError
from nbdserve.common.uri import parse_uri
from overlay.formats.image import State
from overlay.formats.qed.image import QedImage
from tests.support.disks import MIB, random_disk
from tests.support.processes import Process, check, run
from tests.support.qed import make_image, qemu_io, read_u64
from tests.support.servers import TcpAddress, free_tcp_address, nbdkit, qemu_nbd

NBD_OVERLAY = Path(sys.executable).with_name("nbd-overlay")
KIB, GIB, TIB = 1 << 10, 1 << 30, 1 << 40
CLUSTER = 64 * KIB
UNREACHABLE = "nbd://127.0.0.1:1/disk"


def qemu_info(image: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(check("qemu-img", "info", "--output=json", image))
    return answer


def qemu_map(image: Path) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = json.loads(check("qemu-img", "map", "--output=json", image))
    for extent in answer:
        # Told since QEMU 8.2; QED has no compression.
        assert not extent.pop("compressed", False)
    return answer


def our_map(image: Path) -> list[dict[str, Any]]:
    answer: list[dict[str, Any]] = json.loads(check(NBD_OVERLAY, "map", "--json", image))
    return answer


def assert_sound(image: Path) -> None:
    """QEMU and we find neither a corruption nor a leak."""
    # Without the backing, which qemu-img would connect to.
    node = {"driver": "qed", "backing": None, "file": {"driver": "file", "filename": str(image)}}
    check("qemu-img", "check", f"json:{json.dumps(node)}")
    report = json.loads(check(NBD_OVERLAY, "check", "--json", image))
    assert (report["corruptions"], report["leaks"]) == (0, 0)


def assert_same_disk(image: Path, expected: Path) -> None:
    check("qemu-img", "compare", "-f", "qed", "-F", "raw", image, expected)


@contextmanager
def storage_daemon(nodes: list[dict[str, Any]], disk: str, directory: Path) -> Iterator[str]:
    """QEMU's block layer with these nodes, as with -blockdev; the URI at which it serves one of them."""
    socket, pid_file = directory / "storage.sock", directory / "storage.pid"
    argv = ["qemu-storage-daemon", "--pidfile", str(pid_file)]
    for node in nodes:
        argv += ["--blockdev", json.dumps(node)]
    argv += ["--nbd-server", f"addr.type=unix,addr.path={socket}"]
    argv += ["--export", f"type=nbd,id=export,node-name={disk},name=disk"]
    with Process(argv, directory / "storage.log") as daemon:
        daemon.wait_for_pid_file(pid_file)
        yield f"nbd+unix:///disk?socket={socket}"


@pytest.mark.parametrize("size", [512, 1000, CLUSTER - 512, CLUSTER, MIB + 512, 5 * GIB, TIB])
def test_qemu_accepts_an_empty_image_of_any_size(tmp_path: Path, size: int) -> None:
    image = tmp_path / "x.qed"
    check(NBD_OVERLAY, "create", "--layout", "qed", "--backing", UNREACHABLE, "--size", str(size), image)
    info = qemu_info(image)
    assert info["format"] == "qed"
    assert info["virtual-size"] == -(-size // 512) * 512
    assert (info["backing-filename"], info["backing-filename-format"]) == (UNREACHABLE, "raw")
    assert not info["dirty-flag"]
    assert_sound(image)
    assert image.stat().st_blocks * 512 < 64 * KIB


def test_our_image_is_qemus_to_the_byte(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    check(NBD_OVERLAY, "create", "--layout", "qed", "--backing", UNREACHABLE, "--size", "1000001", ours)
    check("qemu-img", "create", "-q", "-f", "qed", "-u", "-F", "raw", "-b", UNREACHABLE, theirs, "1000001")
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("cluster", [4 * KIB, 8 * KIB, CLUSTER, MIB, 2 * MIB, 4 * MIB])
@pytest.mark.parametrize("table", [2, 4, 8, 16])
@pytest.mark.sampled(6)
def test_qemu_writes_to_images_of_every_geometry_that_it_can_open(
    tmp_path: Path, cluster: int, table: int
) -> None:
    image = tmp_path / "x.qed"
    try:
        make_image(image, 3 * GIB, cluster_size=cluster, table_size=table)
    except UsageError:
        theirs = tmp_path / "theirs"
        run(
            "qemu-img",
            "create",
            "-f",
            "qed",
            "-o",
            f"cluster_size={cluster},table_size={table}",
            theirs,
            "3G",
        )
        assert run("qemu-io", "-f", "qed", "-c", "length", theirs).returncode != 0
        return
    with QedImage.open(image, writable=True) as opened:
        opened.write(2 * GIB - 100, b"\x11" * 200)
    qemu_io(image, "read -P 0x11 2147483548 200", "write -P 0x22 3221224960 512", "write -z 0 4M")
    assert_sound(image)
    with QedImage.open(image, writable=True) as opened:
        assert opened.read(3 * GIB - 513, 513) == b"\0" + b"\x22" * 512
        opened.write(1 * GIB, b"\x33" * 512)
    qemu_io(image, "read -P 0x33 1G 512", "read -P 0x11 2147483548 200")
    assert_sound(image)


def test_disks_as_large_as_their_tables_allow_are_written_at_both_ends(tmp_path: Path) -> None:
    for number, (cluster, table, size) in enumerate(
        [(4096, 2, 4 * GIB), (4096, 4, 16 * GIB), (65536, 4, 64 * TIB)]
    ):
        image = tmp_path / f"{number}.qed"
        make_image(image, size, cluster_size=cluster, table_size=table)
        with QedImage.open(image, writable=True) as opened:
            opened.write(0, b"\x44" * 512)
            opened.write(size - 512, b"\x55" * 512)
        qemu_io(image, "read -P 0x44 0 512", f"read -P 0x55 {size - 512} 512")
        assert_sound(image)


@pytest.mark.parametrize("seed", range(3))
def test_qemu_reads_what_we_wrote_and_we_what_qemu_wrote(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    image, expected = tmp_path / "x.qed", tmp_path / "expected"
    size = 8 * MIB + 512 * chance.randrange(1, 100)
    model = bytearray(size)
    make_image(image, size, cluster_size=chance.choice([4096, 16384, CLUSTER]))
    for turn in range(4):
        spans = [(chance.randrange(size // 512) * 512, chance.randrange(1, 300) * 512) for _ in range(12)]
        spans = [(offset, min(length, size - offset)) for offset, length in spans]
        values = [chance.choice([0, turn * 16 + number + 1]) for number in range(len(spans))]
        if turn % 2:
            with QedImage.open(image, writable=True) as opened:
                for (offset, length), value in zip(spans, values, strict=True):
                    if value:
                        opened.write(offset, bytes([value]) * length)
                    else:
                        opened.zero(offset, length)
        else:
            commands = [f"write {f'-P {value}' if value else '-z'} {offset} {length}"
                        for (offset, length), value in zip(spans, values, strict=True)]  # fmt: skip
            qemu_io(image, *commands)
        for (offset, length), value in zip(spans, values, strict=True):
            model[offset : offset + length] = bytes([value]) * length
        expected.write_bytes(model)
        assert_same_disk(image, expected)
        assert_sound(image)
        assert our_map(image) == qemu_map(image)
        with QedImage.open(image) as opened:
            assert opened.read(0, size) == model


def test_qemu_reads_through_to_the_backing_that_the_header_names(tmp_path: Path) -> None:
    content = bytearray(random_disk(tmp_path / "disk", 3 * MIB + 512))
    with nbdkit("--no-sr", "-r", "file", tmp_path / "disk", directory=tmp_path) as server:
        image = tmp_path / "x.qed"
        check(NBD_OVERLAY, "create", "--layout", "qed", "--backing", server.uri("any name"), image)
        assert qemu_info(image)["virtual-size"] == len(content)
        assert_same_disk(image, tmp_path / "disk")
        with QedImage.open(image, writable=True) as opened:
            opened.write(CLUSTER, b"\x66" * CLUSTER)
            opened.zero(10 * CLUSTER, 2 * CLUSTER)
        content[CLUSTER : 2 * CLUSTER] = b"\x66" * CLUSTER
        content[10 * CLUSTER : 12 * CLUSTER] = bytes(2 * CLUSTER)
        qemu_io(image, "write -P 0x77 200000 512", "write -z 1M 128k")
        content[200000:200512] = b"\x77" * 512
        content[MIB : MIB + 2 * CLUSTER] = bytes(2 * CLUSTER)
        (tmp_path / "expected").write_bytes(content)
        assert_same_disk(image, tmp_path / "expected")
        assert_sound(image)
        assert our_map(image) == qemu_map(image)


def test_a_backing_node_given_to_qemu_overrides_the_one_in_the_header(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", MIB)
    image = tmp_path / "x.qed"
    check(
        NBD_OVERLAY,
        "create",
        "--layout",
        "qed",
        "--backing",
        "nbds://unreachable.invalid/disk",
        "--size",
        "1M",
        image,
    )
    with nbdkit("--no-sr", "-r", "file", tmp_path / "disk", directory=tmp_path) as server:
        address = parse_uri(server.uri()).qemu_server()
        nodes: list[dict[str, Any]] = [
            {"driver": "nbd", "node-name": "net", "server": address, "read-only": True},
            {"driver": "raw", "node-name": "remote", "file": "net", "read-only": True},
            {"driver": "file", "node-name": "local", "filename": str(image)},
            {"driver": "qed", "node-name": "disk", "file": "local", "backing": "remote"},
        ]
        with storage_daemon(nodes, "disk", tmp_path) as uri:
            check("nbdcopy", uri, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content
    refused = run("qemu-img", "convert", "-O", "raw", image, tmp_path / "copy")
    assert refused.returncode == 1
    assert "nbds" in refused.stderr


def test_the_backing_is_never_probed_for_a_format(tmp_path: Path) -> None:
    """A guest that writes a qcow2 header to its raw disk must not make QEMU open any file it names."""
    check("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "disk", "1G")
    content = (tmp_path / "disk").read_bytes()
    with nbdkit("-r", "file", tmp_path / "disk", directory=tmp_path) as server:
        image = tmp_path / "x.qed"
        check(NBD_OVERLAY, "create", "--layout", "qed", "--backing", server.uri(), image)
        assert qemu_info(image)["virtual-size"] == -(-len(content) // 512) * 512
        check("qemu-img", "convert", "-O", "raw", image, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes().startswith(content)


@pytest.mark.parametrize(
    "name", ["disk", "a b", "/x", "a/b//c", "ä€", "100%", "a?b=c&d", "a#b", "%41", "a@b[c]", "a:b"]
)
def test_qemu_and_libnbd_ask_for_the_export_that_was_meant(tmp_path: Path, name: str) -> None:
    """The server's content is the export's name that the client asked for."""
    with nbdkit("info", "mode=exportname", directory=tmp_path) as server:
        image = tmp_path / "x.qed"
        check(NBD_OVERLAY, "create", "--layout", "qed", "--backing", server.uri(name), image)
        assert check("nbdcopy", qemu_info(image)["backing-filename"], "-").rstrip("\0") == name
        check("qemu-img", "convert", "-O", "raw", image, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes().rstrip(b"\0").decode() == name


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
@pytest.mark.parametrize("form", ["uri", "old"])
def test_qemu_reaches_backings_over_tcp_however_they_were_written(
    tmp_path: Path, host: str, form: str
) -> None:
    address = free_tcp_address("::1" if host == "::1" else "127.0.0.1")
    content = random_disk(tmp_path / "disk", MIB)
    with qemu_nbd("-r", "-f", "raw", "-x", "a", tmp_path / "disk", directory=tmp_path, at=address):
        bracketed = f"[{host}]" if ":" in host else host
        old = f"nbd:{bracketed}:{address.port}:exportname=a"
        backing = TcpAddress(host, address.port).uri("a") if form == "uri" else old
        image = tmp_path / "x.qed"
        check(NBD_OVERLAY, "create", "--layout", "qed", "--backing", backing, image)
        check("qemu-img", "convert", "-O", "raw", image, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content


def test_a_backing_shorter_than_the_disk_ends_in_zeros(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", 100_001)
    with nbdkit("-r", "file", tmp_path / "disk", directory=tmp_path) as server:
        image = tmp_path / "x.qed"
        check(NBD_OVERLAY, "create", "--layout", "qed", "--backing", server.uri(), "--size", "1M", image)
        check("qemu-img", "convert", "-O", "raw", image, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content.ljust(MIB, b"\0")


@pytest.mark.parametrize("finisher", ["qemu", "us"])
def test_a_half_filled_image_is_finished_by_the_other(tmp_path: Path, finisher: str) -> None:
    content = random_disk(tmp_path / "disk", 4 * MIB + 1024)
    image = tmp_path / "x.qed"
    with nbdkit("--no-sr", "-r", "file", tmp_path / "disk", directory=tmp_path) as server:
        check(NBD_OVERLAY, "create", "--layout", "qed", "--backing", server.uri(), image)
        odd = [offset for offset in range(0, len(content), CLUSTER) if offset // CLUSTER % 2]

        def fill_by_qemu(offsets: list[int]) -> None:
            ranges = [(offset, min(CLUSTER, len(content) - offset)) for offset in offsets]
            node = {
                "driver": "copy-on-read",
                "file": {"driver": "qed", "file": {"driver": "file", "filename": str(image)}},
            }
            commands = [word for offset, length in ranges for word in ("-c", f"read {offset} {length}")]
            check("qemu-io", *commands, f"json:{json.dumps(node)}")

        def fill_by_us(offsets: list[int]) -> None:
            with QedImage.open(image, writable=True) as opened:
                for offset in offsets:
                    opened.write(offset, content[offset : offset + CLUSTER])

        even = [offset for offset in range(0, len(content), CLUSTER) if not offset // CLUSTER % 2]
        first, second = (fill_by_us, fill_by_qemu) if finisher == "qemu" else (fill_by_qemu, fill_by_us)
        first(odd)
        assert_sound(image)
        second(even)
    assert_sound(image)
    with QedImage.open(image) as opened:
        assert {run.state for run in opened.runs(0, opened.size)} == {State.DATA}
        assert opened.read(0, len(content)) == content
    check("qemu-img", "rebase", "-u", "-b", "", image)
    assert_same_disk(image, tmp_path / "disk")


@pytest.mark.exhaustive
def test_qemu_hangs_at_the_end_of_an_odd_sized_backing_without_structured_replies(tmp_path: Path) -> None:
    """What docs/overlay.md warns of: QEMU waits for the rest of the last sector, which nobody sends."""
    random_disk(tmp_path / "disk", 100_001)
    served = ("--no-sr", "-r", "--filter=truncate", "file", tmp_path / "disk")
    read_last_sector = ("qemu-io", "-r", "-f", "qed", "-c", "read 99840 512")
    with nbdkit(*served, directory=tmp_path) as server:
        check(NBD_OVERLAY, "create", "--layout", "qed", "--backing", server.uri(), tmp_path / "odd.qed")
        with pytest.raises(subprocess.TimeoutExpired):
            run(*read_last_sector, tmp_path / "odd.qed", seconds=1)
    with nbdkit(*served, "round-up=512", directory=tmp_path) as server:
        check(NBD_OVERLAY, "create", "--layout", "qed", "--backing", server.uri(), tmp_path / "even.qed")
        check(*read_last_sector, tmp_path / "even.qed")


def test_beyond_4_gib_qemu_img_reports_leaks_that_are_not_there(tmp_path: Path) -> None:
    """What docs/overlay.md warns of: QEMU's check counts one false leak per 65535 clusters of 64 KiB."""
    image = tmp_path / "x.qed"
    make_image(image, 8 * GIB)
    with QedImage.open(image, writable=True) as opened:
        for offset in range(0, 5 * GIB, 1 * MIB):
            place = opened._tables.allocate(16)
            opened._tables.set(offset // CLUSTER, 16, place)
    report = run("qemu-img", "check", "--output=json", image)
    assert (report.returncode, json.loads(report.stdout)["leaks"]) == (3, 1)
    ours = json.loads(check(NBD_OVERLAY, "check", "--json", image))
    assert (ours["corruptions"], ours["leaks"], ours["allocated-clusters"]) == (0, 0, 5 * GIB // CLUSTER)
    assert read_u64(image, CLUSTER) != 0
