"""Writes that go from socket to file through a pipe: exact to the byte, however they arrive or fail."""

from __future__ import annotations

import fcntl
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.backends.base import Backend
from nbdserve.backends.file import FileBackend
from nbdserve.exports import Export, Exports
from nbdserve.splicing import FileRange
from tests.support.disks import KIB, MIB, random_bytes, random_disk
from tests.support.inprocess import running
from tests.support.processes import wait_until
from tests.support.wire import SIMPLE_REPLY, Command, Flag, Wire, request

SIZE = 8 * MIB + 1


class Unwilling(FileBackend):
    """A file to which nothing can be spliced, as with file systems that cannot do that."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, read_only=False)
        # splice(2): EINVAL for a file that is open for appending.
        self._appending = os.open(path, os.O_RDWR | os.O_APPEND)
        self.asked = 0

    def write_range(self, offset: int) -> FileRange | None:
        """Where splicing fails."""
        self.asked += 1
        return FileRange(self._appending, offset)

    def close(self) -> None:
        """Close both."""
        os.close(self._appending)
        super().close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FileBackend]:
    """A disk of an odd size."""
    random_disk(tmp_path / "disk.img", SIZE)
    backend = FileBackend(tmp_path / "disk.img", read_only=False)
    yield backend
    backend.close()


def exports(backend: Backend) -> Exports:
    """One export, of this disk."""
    return Exports([Export("", backend)])


@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
def test_long_and_short_writes_in_turn_land_where_they_belong(
    tmp_path: Path, disk: FileBackend, tcp: bool
) -> None:
    chance = random.Random(7)
    wanted = bytearray(disk.path.read_bytes())
    with running(exports(disk), tmp_path, tcp=tcp) as (_, address), Wire(address) as wire:
        wire.go()
        for cookie in range(60):
            length = chance.choice((1, 512, 64 * KIB, 256 * KIB, 300_001, MIB, 3 * MIB + 17))
            offset = chance.choice((0, chance.randrange(SIZE - length), SIZE - length))
            data = chance.randbytes(length)
            flags = chance.choice((Flag.NONE, Flag.FUA))
            message = request(Command.WRITE, offset, cookie=cookie, flags=flags, data=data)
            # A request that comes in two parts, too: its payload may be received with its header, or not.
            cut = chance.choice((len(message), 28, 1000, len(message) // 2))
            wire.send(message[: min(cut, len(message))])
            wire.send(message[cut:])
            wanted[offset : offset + length] = data
            reply = wire.simple_reply()
            assert (reply.error, reply.cookie) == (0, cookie)
    assert disk.path.read_bytes() == wanted


def test_many_long_writes_at_once_are_all_acknowledged(tmp_path: Path, disk: FileBackend) -> None:
    data = random_bytes(8 * MIB, 3)
    with running(exports(disk), tmp_path) as (_, address), Wire(address) as wire:
        wire.go()
        pieces = range(0, 8 * MIB, MIB)
        wire.send(*(request(Command.WRITE, at, cookie=at, data=data[at : at + MIB]) for at in pieces))
        assert [wire.simple_reply().cookie for _ in pieces] == list(pieces)
    assert disk.path.read_bytes()[: 8 * MIB] == data


@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
def test_a_payload_in_single_bytes_does_not_stop_in_a_full_pipe(
    tmp_path: Path, disk: FileBackend, tcp: bool
) -> None:
    data = random_bytes(MIB, 5)
    with running(exports(disk), tmp_path, tcp=tcp) as (_, address), Wire(address) as wire:
        wire.go()
        # After a long write only the header of the next one is received, and all else goes through the pipe.
        wire.send(request(Command.WRITE, 0, cookie=8, data=bytes(MIB)))
        assert wire.simple_reply().cookie == 8
        message = request(Command.WRITE, 100, cookie=9, data=data)
        wire.send(message[:28])
        wire.send_slowly(message[28:2028], 0.0002)
        wire.send(message[2028:])
        assert wire.simple_reply().cookie == 9
    assert disk.path.read_bytes()[100 : 100 + MIB] == data


def test_what_cannot_be_spliced_to_the_file_is_written(tmp_path: Path) -> None:
    random_disk(tmp_path / "disk.img", SIZE)
    disk, data = Unwilling(tmp_path / "disk.img"), random_bytes(3 * MIB, 4)
    with running(exports(disk), tmp_path) as (_, address), Wire(address) as wire:
        wire.go()
        for offset in (0, 4 * MIB + 3):
            wire.send(request(Command.WRITE, offset, data=data))
            assert wire.simple_reply().error == 0
            assert disk.path.read_bytes()[offset : offset + len(data)] == data
    assert disk.asked == 1, "it is tried once"
    assert disk.path.stat().st_size == SIZE
    disk.close()


def test_a_file_that_takes_only_a_part_fails_the_write_and_the_stream_stays_in_step(tmp_path: Path) -> None:
    descriptor = os.memfd_create("disk", os.MFD_ALLOW_SEALING)
    os.truncate(descriptor, MIB + 1000)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    disk = FileBackend(Path(f"/proc/self/fd/{descriptor}"), read_only=False)
    disk.size = 8 * MIB
    # The payload looks like requests, which it must not be taken for.
    evil = request(Command.TRIM, 0, MIB, cookie=66) * (3 * MIB // 28)
    with running(exports(disk), tmp_path) as (_, address), Wire(address) as wire:
        wire.go()
        wire.send(request(Command.WRITE, 0, cookie=1, data=evil), request(Command.READ, 0, 28, cookie=2))
        failed = wire.simple_reply()
        assert (failed.cookie, failed.error) == (1, 1), "EPERM: the file is sealed"
        assert wire.simple_reply().cookie == 2
        assert wire.receive(28) == evil[:28]
        wire.send(request(Command.WRITE, MIB - 5, cookie=3, data=b"x" * 5))
        assert SIMPLE_REPLY.unpack(wire.receive(SIMPLE_REPLY.size))[1:] == (0, 3)
    disk.close()
    os.close(descriptor)


def test_a_client_that_leaves_in_the_middle_leaves_nothing_open(tmp_path: Path, disk: FileBackend) -> None:
    with running(exports(disk), tmp_path) as (server, address):
        with Wire(address) as wire:
            wire.go()
            before = len(os.listdir("/proc/self/fd"))
            wire.send(request(Command.WRITE, 0, data=random_bytes(4 * MIB))[: 3 * MIB])
            wire.socket.shutdown(socket.SHUT_WR)
            assert wire.is_closed_by_server()
        wait_until(lambda: not server.clients, "the connection has ended")
        assert len(os.listdir("/proc/self/fd")) <= before
        with Wire(address) as wire:
            wire.go()
            wire.send(request(Command.WRITE, 0, cookie=4, data=random_bytes(MIB, 8)))
            assert wire.simple_reply().cookie == 4
