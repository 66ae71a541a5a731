"""Writes that go from socket to file through a pipe: exact to the byte, however they arrive or fail."""

from __future__ import annotations

import fcntl
import logging
import os
import random
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.backends.base import Backend, Buffer
from nbdserve.backends.file import FileBackend
from nbdserve.backends.splicing import FileRange
from nbdserve.connection.handshake import Terms
from nbdserve.connection.policy import Policy
from nbdserve.exports.served_exports import Export, Exports
from nbdserve.service.certificates import Certificates, load
from tests.support.disks import KIB, MIB, random_bytes, random_disk
from tests.support.inprocess import running
from tests.support.processes import PATIENCE, wait_until
from tests.support.servers import Address
from tests.support.tls import Identities, client_context, encrypt
from tests.support.wire import SIMPLE_REPLY, Command, Flag, Option, Reply, Wire, export_query, request

SIZE = 8 * MIB + 1
SHORT = 128 * KIB
"""Bytes from which on a write is stored as it arrives: docs/architecture.md says so."""
LIMIT = 10 * PATIENCE
"""Seconds in which a server that is not stuck answers."""


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


def open_as(kind: type[FileBackend], path: Path) -> FileBackend:
    """A disk of one of these kinds."""
    return Unwilling(path) if kind is Unwilling else kind(path, read_only=False)


class Looking(FileBackend):
    """A file whose writes have to be looked at, so that they are not spliced."""

    def write_range(self, offset: int) -> FileRange | None:
        """Nowhere."""
        return None


def killed_in_a_write(
    address: Address, context: ssl.SSLContext | None, length: int, sent: int, first: int
) -> None:
    """A client that has one write acknowledged, of zeroes, and dies in the middle of another."""
    with Wire(address, LIMIT) as wire:
        wire.greet()
        if context is not None:
            assert wire.haggle(Option.STARTTLS)[-1].kind == Reply.ACK
            encrypt(wire, context)
        assert wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK
        wire.send(request(Command.WRITE, 0, data=bytes(first)))
        assert wire.simple_reply().error == 0
        wire.send(request(Command.WRITE, 123, cookie=9, data=b"x" * length)[: 28 + sent])


@pytest.mark.parametrize("kind", [FileBackend, Looking, Unwilling])
@pytest.mark.parametrize("transport", ["unix", "tcp", "tls"])
@pytest.mark.parametrize("length", [4096, SHORT - 1, SHORT, 3 * MIB])
@pytest.mark.sampled(8)
def test_a_client_that_dies_in_a_write_leaves_nothing_of_a_short_one_and_at_most_what_it_sent_of_a_long_one(
    tmp_path: Path, identities: Identities, kind: type[FileBackend], transport: str, length: int
) -> None:
    before = bytearray(random_disk(tmp_path / "disk.img", SIZE))
    before[: 256 * KIB] = bytes(256 * KIB)
    disk = open_as(kind, tmp_path / "disk.img")
    files = Certificates.in_directory(identities.server, verify_peer=False)
    terms = Terms(tls=load(files).context) if transport == "tls" else Terms()
    context = client_context(identities.nobody) if transport == "tls" else None
    with running(exports(disk), tmp_path, Policy(terms=terms), tcp=transport != "unix") as (server, address):
        for sent in (0, 1, length // 2, length - 1):
            # After a long write only the header of the next is received, after a short one more of it is.
            for first in (4096, 256 * KIB):
                disk.path.write_bytes(before)
                killed_in_a_write(address, context, length, sent, first)
                wait_until(lambda: not server.clients, "the client's end is noticed")
                after = disk.path.read_bytes()
                stored = len(after[123:]) - len(after[123:].lstrip(b"x"))
                assert stored <= (0 if length < SHORT else sent)
                assert after == before[:123] + b"x" * stored + before[123 + stored :]
    disk.close()


class Exhausted(FileBackend):
    """A disk for whose writes there is no memory."""

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Never."""
        raise MemoryError

    def write_range(self, offset: int) -> FileRange | None:
        """Nowhere."""
        return None


def test_a_client_for_whom_there_is_no_memory_is_disconnected_with_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random_disk(tmp_path / "disk.img", SIZE)
    disk = Exhausted(tmp_path / "disk.img", read_only=False)
    with (
        caplog.at_level(logging.INFO, "nbdserve"),
        running(exports(disk), tmp_path) as (server, address),
        Wire(address, LIMIT) as other,
    ):
        other.go()
        with Wire(address, LIMIT) as wire:
            wire.go()
            wire.send(request(Command.WRITE, 0, data=bytes(MIB)))
            assert wire.is_closed_by_server()
        wait_until(lambda: len(server.clients) == 1, "it is gone")
        other.send(request(Command.READ, 0, 4096))
        assert other.simple_reply().error == 0
    assert [record.levelname for record in caplog.records if "no memory left" in record.message] == ["ERROR"]
    disk.close()


@pytest.mark.parametrize("kind", [FileBackend, Looking, Unwilling])
def test_a_write_that_comes_in_many_parts_lands_where_it_belongs(
    tmp_path: Path, kind: type[FileBackend]
) -> None:
    """The pipe may be full of single bytes long before all has come."""
    wanted = bytearray(random_disk(tmp_path / "disk.img", SIZE))
    disk = open_as(kind, tmp_path / "disk.img")
    with running(exports(disk), tmp_path) as (_, address), Wire(address) as wire:
        wire.go()
        wire.send(request(Command.WRITE, 0, data=bytes(wanted[:MIB])))
        assert wire.simple_reply().error == 0
        for offset in (0, 100, 4 * MIB + 4095):
            data = random_bytes(MIB - 1, offset)
            message = request(Command.WRITE, offset, cookie=9, data=data)
            wire.send_slowly(message[:1028], 0.0002)
            wire.send(message[1028:])
            reply = wire.simple_reply()
            assert (reply.error, reply.cookie) == (0, 9)
            wanted[offset : offset + len(data)] = data
    assert disk.path.read_bytes() == wanted
    disk.close()


def test_a_full_disk_is_told_after_the_whole_payload(tmp_path: Path) -> None:
    """A pipe that holds what could not be stored is empty for the next write."""
    descriptor = os.memfd_create("disk", os.MFD_ALLOW_SEALING)
    os.truncate(descriptor, 8 * MIB)
    disk = FileBackend(Path(f"/proc/self/fd/{descriptor}"), read_only=False)
    os.truncate(descriptor, MIB)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    data = random_bytes(MIB)
    with running(exports(disk), tmp_path) as (_, address), Wire(address) as wire:
        wire.go()
        for offset in (2 * MIB, MIB - 5000, MIB // 2 + 123):
            wire.send(request(Command.WRITE, offset, cookie=1, data=data))
            assert wire.simple_reply().error == 1, "EPERM: the file is sealed"
            wire.send(request(Command.WRITE, 0, cookie=2, data=data[: 512 * KIB]))
            reply = wire.simple_reply()
            assert (reply.error, reply.cookie) == (0, 2)
            assert os.pread(descriptor, 512 * KIB, 0) == data[: 512 * KIB]
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
