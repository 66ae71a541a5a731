"""What a client was told is true: written is written, flushed is flushed, and an error is an error.

To see what reaches the disk, the image lies on a disk that can be watched and broken: nbdserve -> a file of
nbdfuse -> nbdkit, whose filters log every write and flush, and fail on command.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbd
import pytest

from tests.support.disks import KIB, MIB, ODD_SIZE, random_bytes, random_disk
from tests.support.fuse import mounted
from tests.support.processes import check
from tests.support.servers import Server, nbdkit, nbdserve
from tests.support.wire import Command, Flag, Wire, request


def connected(uri: str) -> nbd.NBD:
    """A libnbd client that also sends what the server will refuse."""
    client = nbd.NBD()
    client.set_strict_mode(0)
    client.connect_uri(uri)
    return client


@dataclass(frozen=True)
class WatchedDisk:
    """An image whose every access is logged, and that fails while a trigger file exists."""

    server: Server
    journal: Path
    triggers: Path

    def accesses(self) -> list[str]:
        """What was done to the disk so far, completed, in order: Read, Write, Flush, Trim, Zero."""
        words = [line.split()[3] for line in self.journal.read_text().splitlines() if " ..." in line]
        return [word.removeprefix("...") for word in words if word.startswith("...")]

    def fail(self, operation: str) -> None:
        """From now on ``pread`` or ``pwrite`` of the disk fails."""
        (self.triggers / operation).touch()

    def recover(self, operation: str) -> None:
        """From now on it works again."""
        (self.triggers / operation).unlink()


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[WatchedDisk]:
    """nbdserve on a disk that can be watched: reads fail with EIO there, writes with ENOSPC."""
    journal = tmp_path / "journal"
    failing = [
        f"error-{operation}{suffix}"
        for operation, name in (("pread", "EIO"), ("pwrite", "ENOSPC"))
        for suffix in (f"={name}", "-rate=100%", f"-file={tmp_path / operation}")
    ]
    disk = ["--filter=log", "--filter=error", "memory", "4M", f"logfile={journal}", *failing]
    with (
        nbdkit(*disk, directory=tmp_path) as kit,
        mounted(kit.uri(), tmp_path) as image,
        nbdserve("-f", "raw", image, directory=tmp_path) as server,
    ):
        yield WatchedDisk(server, journal, tmp_path)


FUA = nbd.CMD_FLAG_FUA
DURABLE: dict[str, Callable[[nbd.NBD], object]] = {
    "a flush after a write": lambda client: (client.pwrite(b"x" * 4096, 0), client.flush()),
    "a write with FUA": lambda client: client.pwrite(b"x" * 4096, 0, FUA),
    "one byte with FUA": lambda client: client.pwrite(b"x", 12345, FUA),
    "a long write with FUA": lambda client: client.pwrite(b"x" * 2 * MIB, 1000, FUA),
    "zeroes with FUA": lambda client: client.zero(64 * KIB, 0, FUA),
    "zeroes without a hole with FUA": lambda client: client.zero(64 * KIB, 0, FUA | nbd.CMD_FLAG_NO_HOLE),
    "a trim with FUA": lambda client: client.trim(64 * KIB, 0, FUA),
}


@pytest.mark.parametrize("what", DURABLE)
def test_durable_means_that_the_disk_was_flushed_after_the_last_write(
    watched: WatchedDisk, what: str
) -> None:
    client = connected(watched.server.uri())
    client.pwrite(b"before", 2 * MIB)
    assert "Flush" not in watched.accesses(), "nothing has asked for a flush yet"
    DURABLE[what](client)
    changes = [access for access in watched.accesses() if access in ("Write", "Trim", "Zero", "Flush")]
    assert len(changes) > 2
    assert changes[-1] == "Flush"
    client.shutdown()


def test_a_flush_covers_what_another_connection_was_told_is_written(watched: WatchedDisk) -> None:
    writer, flusher = connected(watched.server.uri()), connected(watched.server.uri())
    assert writer.can_multi_conn()
    writer.pwrite(b"x" * 4096, 0)
    flusher.flush()
    assert watched.accesses()[-1] == "Flush"
    writer.shutdown()
    flusher.shutdown()


def test_ending_the_server_flushes_what_was_written(watched: WatchedDisk) -> None:
    client = connected(watched.server.uri())
    client.pwrite(b"x" * 4096, 0)
    client.shutdown()
    assert "Flush" not in watched.accesses()
    assert watched.server.process.terminate() == 0
    assert watched.accesses()[-1] == "Flush"


@pytest.mark.parametrize("length", [4 * KIB, 512 * KIB, 2 * MIB])
@pytest.mark.parametrize("structured", [True, False])
def test_a_read_that_the_disk_fails_is_an_error_and_never_zeroes(
    watched: WatchedDisk, length: int, structured: bool
) -> None:
    client = nbd.NBD()
    client.set_request_structured_replies(structured)
    client.connect_uri(watched.server.uri())
    watched.fail("pread")
    for _ in range(2):
        with pytest.raises(nbd.Error) as failed:
            client.pread(length, 0)
        assert failed.value.errnum == errno.EIO
    watched.recover("pread")
    assert client.pread(length, 0) == bytes(length)
    client.shutdown()
    [line] = [line for line in watched.server.process.output().splitlines() if " fails with " in line]
    assert f"read of {length} bytes at 0 fails with EIO: Input/output error" in line


@pytest.mark.parametrize("length", [4 * KIB, 2 * MIB])
def test_a_write_that_the_disk_has_no_room_for_is_refused_and_the_next_one_is_served(
    watched: WatchedDisk, length: int
) -> None:
    client = connected(watched.server.uri())
    watched.fail("pwrite")
    with pytest.raises(nbd.Error) as failed:
        client.pwrite(b"x" * length, 0)
    assert failed.value.errnum == errno.ENOSPC
    watched.recover("pwrite")
    client.pwrite(b"y" * length, 0)
    assert client.pread(length, 0) == b"y" * length
    client.shutdown()


@pytest.mark.parametrize("structured", [True, False])
def test_a_file_that_shrinks_while_it_is_served_reads_as_an_error(tmp_path: Path, structured: bool) -> None:
    image = tmp_path / "disk.img"
    content = random_disk(image, 4 * MIB)
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        client = nbd.NBD()
        client.set_request_structured_replies(structured)
        client.connect_uri(server.uri())
        with image.open("r+b") as file:
            file.truncate(3 * MIB - 100)
        for offset, length in ((3 * MIB - 100, 1), (3 * MIB - 512, 512), (2 * MIB, 2 * MIB), (3 * MIB, MIB)):
            with pytest.raises(nbd.Error) as failed:
                client.pread(length, offset)
            assert failed.value.errnum == errno.EIO
        assert client.pread(1 * MIB, 1 * MIB) == content[1 * MIB : 2 * MIB]
        client.shutdown()


def test_the_end_of_a_file_that_has_shrunk_is_not_told_to_be_a_hole(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    random_disk(image, 4 * MIB)
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        client = nbd.NBD()
        client.add_meta_context("base:allocation")
        client.connect_uri(server.uri())
        with image.open("r+b") as file:
            file.truncate(3 * MIB)
        for offset in (2 * MIB, 3 * MIB, 4 * MIB - 512):
            with pytest.raises(nbd.Error) as failed:
                client.block_status(4 * MIB - offset, offset, lambda *_: 0)
            assert failed.value.errnum == errno.EIO
        client.shutdown()


BLOCK, BLOCKS, WRITERS = 16 * KIB, 1024, 4


def _write_until_the_server_dies(server: Server, seed: int, enough: threading.Event) -> tuple[int, bytes]:
    """Keep writes in flight; return how many were acknowledged, in order, and all that was to be written."""
    data = random_bytes(BLOCK * BLOCKS, seed)
    acknowledged = 0
    with Wire(server.address) as wire:
        try:
            wire.go()
        except (EOFError, ConnectionError):
            # The others were so fast that it has died before.
            return 0, data

        def send() -> None:
            try:
                for index in range(BLOCKS):
                    offset = (seed * BLOCKS + index) * BLOCK
                    flags = Flag.FUA if index % 64 == 0 else Flag.NONE
                    block = data[index * BLOCK : (index + 1) * BLOCK]
                    wire.send(request(Command.WRITE, offset, cookie=index, flags=flags, data=block))
            except ConnectionError:
                pass

        sender = threading.Thread(target=send)
        sender.start()
        try:
            while acknowledged < BLOCKS:
                assert wire.simple_reply().cookie == acknowledged
                acknowledged += 1
                if acknowledged == BLOCKS // 4:
                    enough.set()
        except (EOFError, ConnectionError):
            pass
        sender.join()
    return acknowledged, data


def test_what_was_acknowledged_is_in_the_file_when_the_server_is_killed(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(WRITERS * BLOCKS * BLOCK))
    results: dict[int, tuple[int, bytes]] = {}
    with nbdserve("-f", "raw", image, directory=tmp_path) as server:
        enough = threading.Event()

        def work(seed: int) -> None:
            results[seed] = _write_until_the_server_dies(server, seed, enough)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(WRITERS)]
        for worker in workers:
            worker.start()
        assert enough.wait(120)
        server.process.kill()
        for worker in workers:
            worker.join()
    content = image.read_bytes()
    assert any(0 < acknowledged < BLOCKS for acknowledged, _ in results.values()), "killed too late"
    for seed, (acknowledged, data) in results.items():
        start = seed * BLOCKS * BLOCK
        assert content[start : start + acknowledged * BLOCK] == data[: acknowledged * BLOCK]


def test_a_copy_goes_on_where_a_killed_server_is_replaced(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    content = random_disk(image, ODD_SIZE)
    with nbdserve("-f", "raw", image, directory=tmp_path) as first:
        client = connected(first.uri())
        client.pwrite(b"acknowledged", 1000)
        first.process.kill()
        with pytest.raises(nbd.Error):
            client.pread(1, 0)
    with nbdserve("-f", "raw", image, directory=tmp_path, at=first.address) as second:
        check("nbdcopy", second.uri(), tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == content[:1000] + b"acknowledged" + content[1012:]
