"""What clients do by accident or on purpose: it costs them their own connection and nobody else anything."""

from __future__ import annotations

import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.disks import KIB, MIB, random_disk
from tests.support.processes import check, wait_until
from tests.support.servers import Address, Server, UnixAddress, free_tcp_address, nbdserve
from tests.support.wire import (
    CHUNK,
    REQUEST,
    REQUEST_MAGIC,
    Chunk,
    Command,
    Option,
    Reply,
    Wire,
    export_query,
    meta_query,
    option,
    request,
)

RESET = struct.pack("ii", 1, 0)  # struct linger: on, 0 seconds: closing sends a reset


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 4 MiB."""
    path = tmp_path / "disk.img"
    random_disk(path, 4 * MIB)
    return path


@pytest.fixture(params=["unix", "tcp"])
def server(request: pytest.FixtureRequest, image: Path, tmp_path: Path) -> Iterator[Server]:
    """A writable server that gives clients two seconds to choose an export."""
    at: Address = UnixAddress(tmp_path / "nbd.sock") if request.param == "unix" else free_tcp_address()
    with nbdserve("-f", "raw", "--handshake-timeout=2", image, directory=tmp_path, at=at) as running:
        yield running


@contextmanager
def undisturbed(server: Server) -> Iterator[None]:
    """Somebody else reads and writes all the while and sees nothing of it; the first MiB is theirs."""
    failures: list[str] = []
    rounds = 0
    stop = threading.Event()

    def work() -> None:
        nonlocal rounds
        with Wire(server.address) as wire:
            wire.go()
            while not stop.is_set() or rounds < 2:
                block = random.Random(rounds).randbytes(64 * KIB)
                wire.send(request(Command.WRITE, 4096, cookie=rounds, data=block))
                wire.send(request(Command.READ, 4096, len(block), cookie=rounds))
                replies = [wire.simple_reply(), wire.simple_reply()]
                if wire.receive(len(block)) != block or any(reply.error for reply in replies):
                    failures.append(f"round {rounds}: {replies}")
                rounds += 1

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        stop.set()
        worker.join()
    assert not failures
    assert rounds >= 2, "the other client was cut off"


def sockets(server: Server) -> int:
    """How many sockets the server holds open."""
    count = 0
    for link in Path(f"/proc/{server.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            count += os.readlink(link).startswith("socket:")
    return count


GARBAGE = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(160),
    "zeroes": bytes(200),
    "noise": random.Random(0).randbytes(70_000),
    "unknown client flags": struct.pack(">I", 0xFF) + option(Option.LIST),
    "wrong option magic": struct.pack(">IQII", 3, 0x1234, Option.LIST, 0),
    "an option of 4 GiB": struct.pack(">I", 3) + option(Option.GO, b"x" * 100, length=0xFFFFFFFF),
    "an option that never comes": struct.pack(">I", 3) + option(Option.GO, b"x", length=1000),
    "a name longer than its option": struct.pack(">I", 3) + option(Option.GO, b"\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("what", GARBAGE)
@pytest.mark.sampled(5)
def test_garbage_instead_of_haggling_ends_with_that_client(server: Server, what: str) -> None:
    before = sockets(server)
    with undisturbed(server), Wire(server.address) as wire:
        wire.receive(18)
        # It may close before everything has been sent.
        try:
            wire.send(GARBAGE[what])
            while wire.socket.recv(4096):
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass
    wait_until(lambda: sockets(server) <= before, "the server has closed the connection")
    assert server.process.running


def test_a_client_that_says_nothing_is_cut_off_when_its_time_is_over(server: Server) -> None:
    started = time.monotonic()
    with undisturbed(server), Wire(server.address) as wire:
        wire.receive(18)
        assert wire.is_closed_by_server()
    assert time.monotonic() - started >= 2


def test_a_client_that_dawdles_gets_no_more_time_for_it(server: Server) -> None:
    with undisturbed(server), Wire(server.address) as wire:
        wire.receive(18)
        wire.send(struct.pack(">I", 3))
        with pytest.raises(ConnectionError):
            wire.send_slowly(option(99) * 50, pause=0.05)


def test_port_scans_leave_no_trace_but_lines_in_the_log(server: Server) -> None:
    before = sockets(server)
    with undisturbed(server):
        for attempt in range(200):
            connection = server.connect()
            if attempt % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.close()
    wait_until(lambda: sockets(server) <= before, "the server has closed the connections")
    assert "Traceback" not in server.process.output()


def test_a_request_that_starts_wrong_ends_with_that_client(server: Server) -> None:
    with undisturbed(server), Wire(server.address) as wire:
        wire.go()
        wire.send(request(Command.READ, 0, 512, cookie=1), b"\0" * 28, request(Command.READ, 0, 512))
        assert wire.simple_reply().cookie == 1
        wire.receive(512)
        assert wire.is_closed_by_server()


@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize("sent", [0, 1, 4096, 1 * MIB - 1])
@pytest.mark.sampled(5)
def test_a_client_killed_in_the_middle_of_a_write_changes_at_most_what_it_was_writing(
    server: Server, image: Path, end: str, sent: int
) -> None:
    before = image.read_bytes()
    with undisturbed(server), Wire(server.address) as wire:
        wire.go()
        header = REQUEST.pack(REQUEST_MAGIC, 0, Command.WRITE, 1, 2 * MIB, 1 * MIB)
        wire.send(header, b"\xee" * sent)
        if end == "reset":
            wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    server.process.wait_for(
        lambda: re.search(r"middle of a|half sent", server.process.output()), "a log line"
    )
    after = image.read_bytes()
    assert after[1 * MIB : 2 * MIB] == before[1 * MIB : 2 * MIB]
    assert after[3 * MIB :] == before[3 * MIB :]
    written = after[2 * MIB : 3 * MIB]
    stored = len(written) - len(written.lstrip(b"\xee"))
    assert stored <= sent
    assert written[stored:] == before[2 * MIB + stored : 3 * MIB]


def test_a_client_killed_while_it_reads_costs_nobody_anything(server: Server) -> None:
    before = sockets(server)
    with undisturbed(server):
        for _ in range(8):
            with Wire(server.address) as wire:
                wire.go()
                wire.send(*[request(Command.READ, 0, MIB, cookie=index) for index in range(16)])
                wire.receive(1)
    wait_until(lambda: sockets(server) <= before, "the server has closed the connections")


def test_a_stalled_reader_does_not_stop_the_others(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.go()
        wire.send(*[request(Command.READ, 0, MIB, cookie=index) for index in range(16)])
        with undisturbed(server):
            check("nbdcopy", server.uri(), "null:")


def test_a_hundred_clients_at_once_are_all_served(server: Server, image: Path) -> None:
    content = image.read_bytes()
    wires = [Wire(server.address) for _ in range(100)]
    for wire in wires:
        wire.go()
        wire.send(request(Command.READ, 12345, 4096))
    for wire in wires:
        assert wire.simple_reply().error == 0
        assert wire.receive(4096) == content[12345:16441]
        wire.socket.close()


SESSION = b"".join(
    [
        struct.pack(">I", 3),
        option(99, b"unknown"),
        option(Option.STRUCTURED_REPLY),
        option(Option.SET_META_CONTEXT, meta_query("", "base:allocation")),
        option(Option.GO, export_query("", (1, 2, 3))),
        request(Command.WRITE, 1 * MIB + 1, cookie=1, data=b"payload"),
        request(Command.READ, 1 * MIB, 9, cookie=2),
        request(99, 5, 6, cookie=3),
        request(Command.WRITE, 4 * MIB, cookie=4, data=b"past the end"),
        request(Command.BLOCK_STATUS, 0, 4 * MIB, cookie=5),
        request(Command.FLUSH, cookie=6),
        request(Command.DISC),
    ]
)


def _answers(server: Server, slowly: bool) -> bytes:
    """Hold a whole conversation, and return everything that the server said."""
    with Wire(server.address) as wire:
        if slowly:
            wire.send_slowly(SESSION)
        else:
            wire.send(SESSION)
        said = bytearray()
        while part := wire.socket.recv(65536):
            said += part
    return bytes(said)


def test_a_conversation_goes_the_same_way_at_once_and_byte_by_byte(server: Server) -> None:
    at_once = _answers(server, slowly=False)
    assert _answers(server, slowly=True) == at_once
    chunks = _chunks(at_once)
    assert [chunk.cookie for chunk in chunks if chunk.done] == [1, 2, 3, 4, 5, 6]
    assert chunks[1].payload[8:][1:8] == b"payload"


def _chunks(said: bytes) -> list[Chunk]:
    """The replies of the transmission phase, simple ones as chunks as well."""
    position = said.index(struct.pack(">I", 0x668E33EF)) if b"\x66\x8e\x33\xef" in said else len(said)
    position = min(position, said.find(struct.pack(">I", 0x67446698)) % (len(said) + 1))
    found: list[Chunk] = []
    while position < len(said):
        if said[position : position + 4] == b"\x67\x44\x66\x98":
            _, error, cookie = struct.unpack_from(">IIQ", said, position)
            found.append(Chunk(True, error, cookie, b""))
            position += 16
            continue
        _, flags, kind, cookie, length = CHUNK.unpack_from(said, position)
        position += CHUNK.size
        found.append(Chunk(bool(flags & 1), kind, cookie, said[position : position + length]))
        position += length
    return found


def test_errors_leave_the_stream_in_step(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.go(structured=True)
        refused = [
            (request(Command.READ, 4 * MIB - 1, 2), 22),
            (request(Command.READ, 2**64 - 1, 2), 22),
            (request(Command.WRITE, 4 * MIB - 1, data=b"xy"), 28),
            (request(Command.WRITE, 2**64 - 2, data=b"xy"), 28),
            (request(Command.WRITE_ZEROES, 4 * MIB - 1, 2), 28),
            (request(Command.TRIM, 4 * MIB, 1), 22),
            (request(Command.READ, 0, 512, flags=0x8000), 22),
            (request(Command.WRITE, 0, flags=0x4, data=b"DF is for reads"), 22),
            (request(Command.BLOCK_STATUS, 0, 512), 22),
            (request(200, 0, 512), 22),
        ]
        for sent, error in refused:
            wire.send(sent, request(Command.READ, 0, 16, cookie=77))
            answer = wire.chunk()
            assert answer.kind == 0x8001, sent
            assert struct.unpack_from(">I", answer.payload) == (error,), sent
            assert wire.chunk().cookie == 77


def test_haggling_errors_leave_the_client_a_choice(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        for number, data, kind in [
            (99, b"", Reply.ERR_UNSUP),
            (Option.PEEK_EXPORT, b"", Reply.ERR_UNSUP),
            (Option.LIST, b"x", Reply.ERR_INVALID),
            (Option.GO, b"", Reply.ERR_INVALID),
            (Option.INFO, b"\0\0\0\x05ab\0\0", Reply.ERR_INVALID),
            (Option.GO, export_query("nope"), Reply.ERR_UNKNOWN),
            (Option.SET_META_CONTEXT, meta_query("", "base:allocation"), Reply.ERR_INVALID),
            (Option.STRUCTURED_REPLY, b"", Reply.ACK),
            (Option.SET_META_CONTEXT, meta_query("nope", "base:allocation"), Reply.ERR_UNKNOWN),
        ]:
            answer = wire.haggle(number, data)[-1]
            assert (answer.option, answer.kind) == (number, kind)
        assert wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK


def test_abort_is_acknowledged_and_ends_the_connection(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        assert wire.haggle(Option.ABORT)[-1].kind == Reply.ACK
        assert wire.is_closed_by_server()
