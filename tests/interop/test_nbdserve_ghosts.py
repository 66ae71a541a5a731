"""A client that loses its connection and comes back: what it sent before never lands on what it sends now."""

from __future__ import annotations

import logging
import socket
import struct
import threading
from pathlib import Path

import pytest

from nbdserve.backends.base import Capabilities
from nbdserve.exports import Export, Exports
from nbdserve.protocol.offers import Offer
from tests.support.inprocess import GatedBackend, one_export, running
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


def test_a_client_that_left_its_writes_behind_while_it_was_haggling_is_waited_for(tmp_path: Path) -> None:
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
            early = is_answered(again, 0.3)
            exports.gate.set()
            assert again.simple_reply().cookie == 7
            wait_until(lambda: len(server.clients) == 1, "the former connection has ended")
            assert disk.content[:3] == b"new"
            assert not early


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
    monkeypatch.setattr("nbdserve.clients.PATIENCE", 0.3)
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
