"""Stock clients agree with nbdserve: about what is there, and about every byte that they read and write."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import KIB, MIB, ODD_SIZE, random_bytes, random_disk, sparse_disk, sparse_runs
from tests.support.fuse import mounted
from tests.support.processes import check, run
from tests.support.servers import Address, Server, UnixAddress, free_tcp_address, nbdserve

PLACES = ("unix", "127.0.0.1", "::1")
REPLIES = ("structured", "simple")
# What the command nbdsh runs, by the interpreter that has libnbd's module.
NBDSH = (sys.executable, "-m", "nbd")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of an odd size, with data and holes."""
    path = tmp_path / "disk.img"
    sparse_disk(path, sparse_runs(ODD_SIZE))
    return path


@pytest.fixture(params=PLACES)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    """Where to listen: each kind of socket in turn."""
    if request.param == "unix":
        return UnixAddress(tmp_path / "nbdserve.sock")
    return free_tcp_address(request.param)


@pytest.fixture(params=REPLIES)
def server(request: pytest.FixtureRequest, image: Path, tmp_path: Path) -> Iterator[Server]:
    """A writable server of the image, with structured replies and without."""
    simple = ["--simple-replies"] if request.param == "simple" else []
    with nbdserve("-f", "raw", *simple, image, directory=tmp_path) as running:
        yield running


def qemu_io(uri: str, *commands: str) -> str:
    """Run qemu-io's commands one after another and return its output; it exits with 0 whatever they say."""
    options = [word for command in commands for word in ("-c", command)]
    output = check("qemu-io", "-f", "raw", *options, uri)
    assert "failed" not in output, output
    assert "error" not in output.lower(), output
    return output


def test_every_client_finds_the_same_size_over_every_kind_of_socket(
    image: Path, address: Address, tmp_path: Path
) -> None:
    with nbdserve("-f", "raw", image, directory=tmp_path, at=address) as server:
        assert check("nbdinfo", "--size", server.uri()) == f"{ODD_SIZE}\n"
        assert check(*NBDSH, "-u", server.uri(), "-c", "print(h.get_size())") == f"{ODD_SIZE}\n"
        sectors = -(-ODD_SIZE // 512)  # QEMU's block layer rounds up to sectors
        information = json.loads(check("qemu-img", "info", "--output=json", server.uri()))
        assert information["virtual-size"] == sectors * 512
        check("nbdcopy", server.uri(), tmp_path / "copy.img")
        assert (tmp_path / "copy.img").read_bytes() == image.read_bytes()


def test_nbdinfo_sees_everything_that_a_raw_file_can_do(server: Server) -> None:
    told = json.loads(check("nbdinfo", "--json", server.uri()))
    structured = "--simple-replies" not in server.process.argv
    assert told["protocol"] == "newstyle-fixed"
    assert told["structured"] is structured
    (export,) = told["exports"]
    contexts = ["base:allocation", "qemu:allocation-depth"]
    assert export.get("contexts", []) == (contexts if structured else [])
    abilities = {name for name, value in export.items() if name.startswith("can_") and value}
    always = {"can_cache", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"}
    assert abilities == always | ({"can_df"} if structured else set())
    assert export["is_read_only"] is False
    assert export["block_size_minimum"] == 1
    assert export["export-size"] == ODD_SIZE


@pytest.mark.parametrize("connections", [1, 4])
def test_nbdcopy_copies_in_both_directions(
    server: Server, image: Path, tmp_path: Path, connections: int
) -> None:
    options = [f"--connections={connections}", "--requests=16", "--request-size=65536"]
    copy = tmp_path / "copy.img"
    check("nbdcopy", *options, server.uri(), copy)
    assert copy.read_bytes() == image.read_bytes()
    fresh = random_disk(tmp_path / "fresh.img", ODD_SIZE, seed=7)
    check("nbdcopy", *options, "--flush", tmp_path / "fresh.img", server.uri())
    assert image.read_bytes() == fresh


# Without block status qemu-img 7.2 compares the last partial sector of an odd-sized export for ever, whoever
# serves it (nbdkit --no-sr as well): its own rounded end is beyond the server's.
@pytest.mark.parametrize(("options", "size"), [([], ODD_SIZE), (["--simple-replies"], 3 * MIB)])
def test_qemu_img_compares_and_converts(tmp_path: Path, options: list[str], size: int) -> None:
    image, copy = tmp_path / "disk.img", tmp_path / "copy.qcow2"
    sparse_disk(image, sparse_runs(size))
    with nbdserve("-f", "raw", *options, image, directory=tmp_path) as server:
        assert "identical" in check("qemu-img", "compare", "-f", "raw", "-F", "raw", image, server.uri())
        check("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri(), copy)
        assert "identical" in check("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, copy)
        with image.open("r+b") as file:
            file.seek(size - 1)
            file.write(b"!")
        assert run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", server.uri(), copy).returncode == 1


def test_qemu_img_converts_into_an_export(tmp_path: Path) -> None:
    source, target = tmp_path / "source.qcow2", tmp_path / "target.img"
    content = sparse_disk(tmp_path / "source.img", sparse_runs(4 * MIB))
    check("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "source.img", source)
    random_disk(target, 4 * MIB, seed=3)
    with nbdserve("-f", "raw", target, directory=tmp_path) as server:
        check("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", source, server.uri())
        assert target.read_bytes() == content


def test_qemu_io_does_to_an_export_what_it_would_do_to_the_file(server: Server, image: Path) -> None:
    expected = bytearray(image.read_bytes())
    last = ODD_SIZE - 4097
    scenario = [
        ("write -P 0x11", 0, 64 * KIB, b"\x11"),
        ("write -P 0x12", 4097, 1, b"\x12"),
        ("write -P 0x13 -f", 70001, 12345, b"\x13"),
        ("write -z", 128 * KIB, 64 * KIB, b"\0"),
        ("write -z -u", 32769, 4095, b"\0"),
        ("write -z -f", 300 * KIB, 1 * KIB, b"\0"),
        ("aio_write -P 0x14", 1 * MIB - 7, 2 * MIB, b"\x14"),
        ("write -P 0x15", last, 4097, b"\x15"),
        ("discard", 2 * MIB, 64 * KIB, b"\0"),
    ]
    qemu_io(
        server.uri(),
        *[f"{command} {offset} {length}" for command, offset, length, _ in scenario],
        "aio_flush",
        "flush",
    )
    for _, offset, length, pattern in scenario:
        expected[offset : offset + length] = pattern * length
    assert image.read_bytes() == expected
    qemu_io(
        server.uri(),
        "read -P 0x11 0 4097",
        "read -P 0x12 4097 1",
        "read -P 0x13 70001 12345",
        "read -P 0 131072 65536",
        "read -P 0x14 1048569 1000000",
        f"read -P 0x15 {last} 4097",
    )


def fio(uri: str, *job: str) -> dict[str, dict[str, int]]:
    """Run a verifying fio job against an export and return what fio tells of it."""
    engine = ["--name=verify", "--ioengine=nbd", f"--uri={uri}", "--verify=crc32c", "--verify_fatal=1"]
    # Its file of what it has verified would lie in the working directory.
    output = check("fio", *engine, *job, "--iodepth=16", "--verify_state_save=0", "--output-format=json")
    (told, *_) = json.loads(output[output.index("{") :])["jobs"]
    return dict(told)


@pytest.mark.parametrize("access", ["randwrite", "write", "randrw"])
def test_fio_reads_back_what_it_wrote(server: Server, access: str) -> None:
    sizes = "--bssplit=512/20:4k/40:4608/20:64k/20"
    told = fio(server.uri(), f"--rw={access}", sizes, "--bs_unaligned", "--size=3m", "--fsync=64")
    assert told["read"]["total_ios"] > 0
    assert told["write"]["total_ios"] > 0


def test_fio_reads_back_what_eight_connections_wrote_at_once(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(16 * MIB))
    with nbdserve("-f", "raw", tmp_path / "disk.img", directory=tmp_path) as server:
        fio(server.uri(), "--rw=randwrite", "--bs=4k", "--numjobs=8", "--size=2m", "--offset_increment=2m")


def test_fio_notices_one_changed_byte(server: Server, image: Path) -> None:
    job = ["--rw=randwrite", "--bs=4k", "--size=1m"]
    fio(server.uri(), *job)
    fio(server.uri(), *job, "--verify_only")
    with image.open("r+b") as file:
        file.seek(512 * KIB + 1234)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0x10]))
    with pytest.raises(AssertionError, match="verify"):
        fio(server.uri(), *job, "--verify_only")


EVERY_COMMAND = f"""
import errno
size = {ODD_SIZE}
h.pwrite(b"a" * 100_000, 11)
assert h.pread(100_002, 10)[1:-1] == b"a" * 100_000
h.pwrite(b"b" * 7, size - 7, nbd.CMD_FLAG_FUA)
assert h.pread(7, size - 7) == b"b" * 7
h.zero(50_000, 12)
h.zero(10, 70_000, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(10, 80_000, nbd.CMD_FLAG_FAST_ZERO)
h.trim(4096, 81_920)
h.cache(size, 0)
h.flush()
assert h.pread(50_002, 11) == b"a" + bytes(50_000) + b"a"
assert h.pread(12, 69_999) == b"a" + bytes(10) + b"a"
assert h.pread(12, 79_999) == b"a" + bytes(10) + b"a"
h.set_strict_mode(0)
for attempt, expected in [
    (lambda: h.pread(2, size - 1), errno.EINVAL),
    (lambda: h.pwrite(b"xy", size - 1), errno.ENOSPC),
    (lambda: h.zero(2, size - 1), errno.ENOSPC),
    (lambda: h.trim(2, size - 1), errno.EINVAL),
]:
    try:
        attempt()
    except nbd.Error as error:
        assert error.errnum == expected, (error, expected)
    else:
        raise AssertionError(f"expected {{expected}}")
assert h.pread(7, size - 7) == b"b" * 7
"""


def test_nbdsh_speaks_every_command(server: Server, image: Path) -> None:
    check(*NBDSH, "-u", server.uri(), "-c", EVERY_COMMAND)
    content = image.read_bytes()
    assert content[-7:] == b"b" * 7
    assert len(content) == ODD_SIZE


def test_the_largest_read_and_write_that_libnbd_sends_work(tmp_path: Path) -> None:
    size = 64 * MIB
    image = tmp_path / "disk.img"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(size + 1)
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        script = (
            f"data = bytes(range(256)) * ({size} // 256);"
            "h.pwrite(data, 1);"
            f"assert h.pread({size}, 1) == data;"
            f"assert h.pread_structured({size}, 1, lambda *a: None, nbd.CMD_FLAG_DF) == data"
        )
        check(*NBDSH, "-u", server.uri(), "-c", script)


def test_nbdfuse_mounts_an_export(server: Server, image: Path, tmp_path: Path) -> None:
    with mounted(server.uri(), tmp_path) as file:
        assert file.stat().st_size == ODD_SIZE
        assert file.read_bytes() == image.read_bytes()
        fresh = random_bytes(100_001, seed=5)
        with file.open("r+b") as disk:
            disk.seek(77_777)
            disk.write(fresh)
    assert image.read_bytes()[77_777 : 77_777 + 100_001] == fresh
