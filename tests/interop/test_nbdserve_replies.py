"""Clients that take no replies: what was under way for them is given back, and no stream is ever mixed up."""

from __future__ import annotations

import fcntl
import logging
import socket
import ssl
import struct
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.backends.file import FileBackend
from nbdserve.connection.handshake import Terms
from nbdserve.connection.policy import Policy
from nbdserve.exports.served_exports import Export, Exports
from nbdserve.protocol.constants import Command
from nbdserve.service.certificates import Certificates, load
from nbdserve.service.server import Server
from tests.support.disks import MIB, random_disk
from tests.support.inprocess import running
from tests.support.processes import wait_until
from tests.support.servers import Address
from tests.support.tls import Identities, client_context, encrypt
from tests.support.wire import Option, Reply, Wire, export_query, extended_request, request

SIZE = 16 * MIB
BORDER = SIZE // 2
FRAMINGS = ("simple", "structured", "extended")
TRANSPORTS = ("unix", "tcp", "tls")


class HalfFar(FileBackend):
    """A file of which everything from the border on, and every flush, is served by workers.

    Flushes wait until ``gate`` opens.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, read_only=False)
        self.gate = threading.Event()

    def flush(self) -> None:
        """Flush when the gate is open."""
        assert self.gate.wait(30), "nobody has opened the gate"
        super().flush()

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """What is before the border."""
        return offset < BORDER and super().read_now(offset, buffer)

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """What is before the border."""
        return command != Command.FLUSH and offset < BORDER


class Client:
    """A client of one kind, which takes only the replies that it is told to take."""

    def __init__(self, address: Address, framing: str, transport: str, identities: Identities) -> None:
        self.framing = framing
        self.wire = Wire(address, 30)
        # What the client does not take shall not find room on the way.
        self.wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        self.wire.greet()
        if transport == "tls":
            assert self.wire.haggle(Option.STARTTLS)[-1].kind == Reply.ACK
            encrypt(self.wire, client_context(identities.nobody))
        if framing != "simple":
            kind = Option.STRUCTURED_REPLY if framing == "structured" else Option.EXTENDED_HEADERS
            assert self.wire.haggle(kind)[-1].kind == Reply.ACK
        assert self.wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK

    def ask(self, command: int, offset: int = 0, length: int = 0, cookie: int = 0) -> None:
        """Send a request."""
        build = extended_request if self.framing == "extended" else request
        self.wire.send(build(command, offset, length, cookie=cookie))

    def everything(self) -> bytes:
        """All that is still to be had."""
        received = bytearray()
        try:
            while data := self.wire.socket.recv(MIB):
                received += data
        except (ConnectionResetError, ssl.SSLError):
            pass  # the end came without TLS's goodbye
        return bytes(received)


def spelled(framing: str, cookie: int, asked: int, offset: int, data: bytes) -> bytes:
    """A piece of the reply to a read at the offset ``asked``; a simple reply is one piece."""
    if framing == "simple":
        return struct.pack(">IIQ", 0x67446698, 0, cookie) + data
    length = 8 + len(data)
    if framing == "structured":
        return struct.pack(">IHHQIQ", 0x668E33EF, 0, 1, cookie, length, offset) + data
    return struct.pack(">IHHQQQQ", 0x6E8A278C, 0, 1, cookie, asked, length, offset) + data


@contextmanager
def serving(
    directory: Path, transport: str, identities: Identities, stall: float
) -> Iterator[tuple[Server, Address, bytes, threading.Event]]:
    """A server of a disk that is half far, what is on it, and the gate for flushes."""
    content = random_disk(directory / "disk.img", SIZE)
    backend = HalfFar(directory / "disk.img")
    files = Certificates.in_directory(identities.server, verify_peer=False)
    terms = Terms(tls=load(files).context) if transport == "tls" else Terms()
    exports = Exports([Export("", backend)])
    try:
        with running(exports, directory, Policy(stall=stall, terms=terms), tcp=transport != "unix") as (
            server,
            address,
        ):
            yield server, address, content, backend.gate
    finally:
        backend.gate.set()
        exports.close()


def unread(client: Client) -> int:
    """Bytes that have come and that the client has not taken."""
    count = fcntl.ioctl(client.wire.socket, termios.FIONREAD, bytes(4))
    return int.from_bytes(count, sys.byteorder)


def is_steady(client: Client) -> bool:
    """Whether nothing more comes for a moment."""
    before = unread(client)
    time.sleep(0.1)
    return unread(client) == before


def is_as_before(server: Server) -> bool:
    """Whether nothing is held for any client."""
    return not server.clients and server.memory.held == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize(
    ("leaves", "far"), [("closes", False), ("closes", True), ("resets", True), ("stays", True)]
)
@pytest.mark.sampled(6)
def test_a_client_that_takes_nothing_gives_everything_back_and_keeps_nobody_out(
    tmp_path: Path, identities: Identities, framing: str, transport: str, leaves: str, far: bool
) -> None:
    stall = 1 if leaves == "stays" else 60
    with serving(tmp_path, transport, identities, stall) as (server, address, content, gate):
        client = Client(address, framing, transport, identities)
        client.ask(Command.FLUSH, cookie=1)
        for number in range(60):
            # Some are spliced, some are gathered, and some are served by workers.
            place = BORDER if far and number % 3 == 2 else 0
            length = MIB if number % 3 else 4096
            client.ask(Command.READ, place + number * 4096, length, cookie=number + 2)
        wait_until(lambda: unread(client) > 32 << 10, "replies fill the way to the client")
        wait_until(lambda: is_steady(client), "the server waits for the client to take some")
        gate.set()
        wait_until(lambda: is_steady(client), "what is ready now waits as well")
        if leaves == "resets":
            client.wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if leaves != "stays":
            client.wire.socket.close()
        wait_until(lambda: is_as_before(server), "everything is given back", seconds=30)
        client.wire.socket.close()
        again = Client(address, framing, transport, identities)
        again.ask(Command.READ, 0, 4096, cookie=7)
        answer = spelled(framing, 7, 0, 0, content[:4096])
        assert again.wire.receive(len(answer))[-4096:] == content[:4096]
        again.wire.socket.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.sampled(3)
def test_what_follows_half_a_reply_is_never_sent(
    tmp_path: Path, identities: Identities, framing: str, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker's reply of 8 MiB is given up in the middle; then a long read asks to be spliced."""
    with serving(tmp_path, transport, identities, 0.5) as (server, address, content, _):
        with caplog.at_level(logging.INFO):
            client = Client(address, framing, transport, identities)
            client.ask(Command.READ, BORDER, BORDER, cookie=1)
            wait_until(lambda: "takes no replies" in caplog.text, "the reply is given up", seconds=30)
        try:
            for number in range(4):
                client.ask(Command.READ, number * MIB, MIB, cookie=2 + number)
        except OSError:
            pass
        received = client.everything()
        client.wire.socket.close()
        wait_until(lambda: is_as_before(server), "everything is given back", seconds=30)
    pieces = b"".join(replies(framing, content))
    assert len(received) < BORDER
    assert pieces.startswith(received), "something else was sent into the middle of the reply"


def replies(framing: str, content: bytes) -> Iterator[bytes]:
    """The reply to the one long read as it would be whole."""
    piece = BORDER if framing == "simple" else 256 << 10
    for offset in range(BORDER, SIZE, piece):
        yield spelled(framing, 1, BORDER, offset, content[offset : offset + piece])
