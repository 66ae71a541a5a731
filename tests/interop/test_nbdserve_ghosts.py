"""A client that loses its connection and comes back: what it sent before never lands on what it sends now."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.backends.base import Capabilities
from nbdserve.exports.served_exports import Export, Exports
from nbdserve.protocol.extents import Extent
from nbdserve.protocol.offers import Offer
from tests.support.inprocess import GatedBackend, one_export, running
from tests.support.memory import MemoryBackend
from tests.support.processes import wait_until
from tests.support.wire import Command, Option, Wire, export_query, option, request

SIZE = 64 << 10
RESET = struct.pack("ii", 1, 0)  # struct linger: on, 0 seconds: closing sends a reset


def write(data: bytes, cookie: int = 0) -> bytes:
    """A request that stores the data at the start of the disk."""
    return request(Command.WRITE, 0, cookie=cookie, data=data)


def is_answered(wire: Wire, seconds: float) -> bool:
    """Whether something comes within so many seconds."""
    wire.socket.settimeout(seconds)
    try:
        return bool(wire.socket.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        wire.socket.settimeout(60)


@pytest.mark.parametrize("end", ["close", "reset", "half-close"])
@pytest.mark.parametrize("local", [True, False], ids=["in-line", "worker"])
@pytest.mark.parametrize("tcp", [True, False], ids=["tcp", "unix"])
@pytest.mark.sampled(4)
def test_an_old_write_never_lands_on_a_newer_one(tmp_path: Path, local: bool, tcp: bool, end: str) -> None:
    disk = GatedBackend(SIZE, local=local)
    with running(one_export(disk), tmp_path, tcp=tcp) as (server, address):
        former = Wire(address)
        former.go()
        former.send(*[write(b"old%d" % number) for number in range(5)])
        wait_until(lambda: disk.waiting, "the first old write is in the disk's hands")
        if end == "half-close":
            former.socket.shutdown(socket.SHUT_WR)
        else:
            if end == "reset":
                former.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            former.socket.close()
        with Wire(address) as again:
            again.go()
            again.send(write(b"new", cookie=7))
            early = is_answered(again, 0.3)
            disk.gate.set()
            assert again.simple_reply().cookie == 7
            wait_until(lambda: len(server.clients) == 1, "the former connection has ended")
            assert disk.content[:3] == b"new", "an old write came after the newer one"
            assert disk.content[3] in b"01234", "the old writes were done, before"
            assert not early
        former.socket.close()


class GatedExports(Exports):
    """The first client that asks for an export waits until ``gate`` opens."""

    def __init__(self, export: Export) -> None:
        super().__init__([export])
        self.gate = threading.Event()
        self.asked = 0

    def offer(self, name: str) -> Offer | None:
        """What is said of an export."""
        self.asked += 1
        if self.asked == 1:
            assert self.gate.wait(300), "nobody has opened the gate"
        return super().offer(name)


def test_what_a_client_sent_while_it_was_haggling_is_not_written_after_another_has_come(
    tmp_path: Path,
) -> None:
    disk = GatedBackend(SIZE, local=True)
    disk.gate.set()
    exports = GatedExports(Export("", disk))
    with running(exports, tmp_path) as (server, address):
        with Wire(address) as former:
            former.greet()
            former.send(option(Option.GO, export_query("")), write(b"old!"))
            wait_until(lambda: exports.asked, "the former client is about to choose")
        with Wire(address) as again:
            again.go()
            again.send(write(b"new", cookie=7))
            assert again.simple_reply().cookie == 7
            exports.gate.set()
            wait_until(lambda: len(server.clients) == 1, "the former connection has ended")
            assert disk.content[:4] == b"new\0"


def test_nobody_waits_for_a_client_that_is_still_there(tmp_path: Path) -> None:
    disk = GatedBackend(SIZE, local=True)
    with running(one_export(disk), tmp_path) as (_, address), Wire(address) as busy, Wire(address) as other:
        busy.go()
        busy.send(write(b"old"))
        wait_until(lambda: disk.waiting, "the write is in the disk's hands")
        other.go()
        other.send(write(b"new", cookie=7))
        assert other.simple_reply().cookie == 7
        disk.gate.set()
        assert busy.simple_reply().error == 0


def test_readers_and_clients_of_other_exports_wait_for_nobody(tmp_path: Path) -> None:
    disk, other = GatedBackend(SIZE, local=True), GatedBackend(SIZE, local=True)
    other.capabilities = Capabilities(read_only=True)
    exports = Exports(
        [Export("", disk), Export("other", GatedBackend(SIZE, local=True)), Export("ro", other)]
    )
    with running(exports, tmp_path) as (_, address):
        with Wire(address) as former:
            former.go()
            former.send(write(b"old"))
            wait_until(lambda: disk.waiting, "the write is in the disk's hands")
        for name in ("other", "ro"):
            with Wire(address) as wire:
                wire.go(name)
                wire.send(request(Command.READ, 0, 512, cookie=7))
                assert wire.simple_reply().cookie == 7
        disk.gate.set()


def test_a_client_whose_former_writes_hang_is_turned_away_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nbdserve.connection.connected_clients.PATIENCE", 0.3)
    disk = GatedBackend(SIZE, local=True)
    with running(one_export(disk), tmp_path) as (_, address), caplog.at_level(logging.INFO):
        with Wire(address) as former:
            former.go()
            former.send(write(b"old"))
            wait_until(lambda: disk.waiting, "the write is in the disk's hands")
        with Wire(address) as again:
            again.go()
            again.send(write(b"new"))
            assert again.is_closed_by_server()
        line = "turned away: a client that went away has kept export '' busy"
        wait_until(lambda: line in caplog.text, "a line in the log")
        disk.gate.set()
    assert disk.content[:3] == b"old"


def test_a_server_that_stops_lets_nobody_wait(tmp_path: Path) -> None:
    disk = GatedBackend(SIZE, local=True)
    with running(one_export(disk), tmp_path) as (server, address):
        with Wire(address) as former:
            former.go()
            former.send(write(b"old"))
            wait_until(lambda: disk.waiting, "the write is in the disk's hands")
        with Wire(address) as again:
            again.go()
            again.send(write(b"new"))
            assert not is_answered(again, 0.2)
            server.stop()
            assert again.is_closed_by_server()
            disk.gate.set()


class Hanging(MemoryBackend):
    """A disk on which everything but writing hangs until ``gate`` opens, where it is not flushed."""

    def __init__(self, size: int, *, local: bool) -> None:
        super().__init__(size)
        self._local = local
        self.gate = threading.Event()
        self.hung = 0

    def _hang(self) -> None:
        self.hung += 1
        assert self.gate.wait(120), "nobody has opened the gate"

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """In its time."""
        self._hang()
        super().read_into(offset, buffer)

    def cache(self, offset: int, length: int) -> None:
        """In its time."""
        self._hang()

    def flush(self) -> None:
        """In its time."""
        self._hang()

    def extents(self, offset: int, length: int, context: str) -> Iterator[Extent]:
        """In its time."""
        self._hang()
        return super().extents(offset, length, context)

    def is_local(self, command: int, offset: int, length: int) -> bool:
        """Everything, or nothing."""
        return self._local


LARGE = 4 << 20
CHANGES = {
    "short": (Command.WRITE, b"old!" * 1024),
    "long": (Command.WRITE, b"old!" * (64 << 10)),
    "zeroes": (Command.WRITE_ZEROES, b""),
    "trim": (Command.TRIM, b""),
}
HARMLESS = {
    "read": (Command.READ, 4096, 1),
    "reads": (Command.READ, 1 << 20, 400),
    "cache": (Command.CACHE, LARGE, 1),
    "flush": (Command.FLUSH, 0, 1),
    "status": (Command.BLOCK_STATUS, LARGE, 1),
}


# A long write does not fit into TCP's buffer here: then the kernel of the client, which is gone, has the rest
# and the end of the stream, and nobody can know that it is gone.
@pytest.mark.parametrize(
    ("tcp", "left"),
    [*((False, left) for left in CHANGES), *((True, left) for left in CHANGES if left != "long")],
)
@pytest.mark.parametrize("asked", HARMLESS)
@pytest.mark.parametrize("local", [True, False], ids=["in-line", "worker"])
@pytest.mark.sampled(10)
def test_what_only_reads_keeps_no_newcomer_out_and_no_change_that_follows_it_lands_later(
    tmp_path: Path, tcp: bool, local: bool, asked: str, left: str
) -> None:
    disk = Hanging(LARGE, local=local)
    with running(one_export(disk), tmp_path, tcp=tcp) as (server, address):
        former = Wire(address)
        former.go(contexts=("base:allocation",))
        command, length, times = HARMLESS[asked]
        change, data = CHANGES[left]
        harmless = request(command, 0, length) * times
        # What follows the first is still in the buffers of server or kernel when the client goes.
        sending = threading.Thread(
            target=send_all, args=(former, harmless + request(change, 0, LARGE, data=data))
        )
        sending.start()
        wait_until(lambda: disk.hung, "the disk hangs")
        sending.join(60)
        former.socket.close()
        with Wire(address, 60) as again:
            again.go()
            again.send(write(b"new", cookie=7))
            assert again.simple_reply().cookie == 7, "the disk still hangs"
            disk.gate.set()
            wait_until(lambda: len(server.clients) == 1, "the former connection has ended")
            assert disk.content[:3] == b"new", "an old write came after the newer one"
            again.send(write(b"more", cookie=8))
            assert again.simple_reply().cookie == 8


def send_all(wire: Wire, data: bytes) -> None:
    """Send it, as far as the server takes it."""
    with contextlib.suppress(OSError):
        wire.send(data)


def test_one_who_takes_no_replies_keeps_no_newcomer_out(tmp_path: Path) -> None:
    """A client that has half closed: whether it is still there cannot be known."""
    disk = MemoryBackend(LARGE)
    with running(one_export(disk), tmp_path, tcp=True) as (server, address):
        former = Wire(address)
        former.go()
        former.send(request(Command.READ, 0, LARGE) * 10, write(b"old!"))
        former.socket.shutdown(socket.SHUT_WR)
        with Wire(address, 60) as again:
            again.go()
            again.send(write(b"new", cookie=7))
            assert again.simple_reply().cookie == 7
            former.socket.close()
            wait_until(lambda: len(server.clients) == 1, "the former connection has ended")
            assert disk.content[:4] == b"new\0"


def test_a_newcomer_that_goes_while_it_waits_is_succeeded_by_the_next(tmp_path: Path) -> None:
    disk = GatedBackend(SIZE, local=True)
    with running(one_export(disk), tmp_path) as (server, address):
        with Wire(address) as first:
            first.go()
            first.send(write(b"old1"))
            wait_until(lambda: disk.waiting, "the write is in the disk's hands")
        with Wire(address) as second:
            second.go()
            second.send(write(b"2nd!"))
            assert not is_answered(second, 0.2)
        with Wire(address) as third:
            third.go()
            third.send(write(b"3rd", cookie=7))
            assert not is_answered(third, 0.2)
            disk.gate.set()
            assert third.simple_reply().cookie == 7
            wait_until(lambda: len(server.clients) == 1, "the former connections have ended")
            assert disk.content[:4] == b"3rd1"


def test_changes_that_no_worker_has_begun_are_not_made(tmp_path: Path) -> None:
    """More than there are workers: the first hang in the disk, the others have not begun."""
    disk = GatedBackend(SIZE, local=False)
    with running(one_export(disk), tmp_path) as (server, address):
        formers = [Wire(address) for _ in range(2)]
        for former in formers:
            former.go()
            former.send(*[request(Command.WRITE, number * 4, data=b"old!") for number in range(60)])
        wait_until(lambda: disk.waiting == 64, "all workers wait for the disk")
        for former in formers:
            former.socket.close()
        with Wire(address, 60) as again:
            again.go()
            again.send(write(b"new", cookie=7))
            assert not is_answered(again, 0.2)
            disk.gate.set()
            assert again.simple_reply().cookie == 7
            wait_until(lambda: len(server.clients) == 1, "the former connections have ended")
            assert disk.content[:4] == b"new!"
            written = sum(disk.content[number * 4 : number * 4 + 4] == b"old!" for number in range(60))
            assert written <= 60
            # Its own reply is sent a moment before its request is forgotten.
            wait_until(lambda: server.memory.held == 0, "all memory is given back")
