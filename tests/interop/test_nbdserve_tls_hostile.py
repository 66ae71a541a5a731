"""TLS and clients that try to get around it, go away in the middle, or never come to the point."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.disks import KIB, MIB, ODD_SIZE, random_disk
from tests.support.processes import check, wait_until
from tests.support.servers import Server, free_tcp_address, nbdserve
from tests.support.tls import Identities, client_context, encrypt, secure, started
from tests.support.wire import Command, Option, Reply, Wire, export_query, meta_query, option, request


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw image of an odd size."""
    path = tmp_path_factory.mktemp("image") / "disk.img"
    random_disk(path, ODD_SIZE)
    return path


@pytest.fixture(scope="module")
def required(identities: Identities, image: Path) -> Iterator[Server]:
    """A server that wants TLS of everyone. It has all these clients one after the other."""
    options = [f"--tls-certificates={identities.server}", "--tls-require", "--handshake-timeout=600"]
    with nbdserve("-f", "raw", *options, image, directory=image.parent, at=free_tcp_address()) as server:
        yield server


@pytest.fixture(scope="module")
def optional(identities: Identities, image: Path) -> Iterator[Server]:
    """A server that leaves it to the client."""
    options = [f"--tls-certificates={identities.server}", "-r"]
    with nbdserve("-f", "raw", *options, image, directory=image.parent, at=free_tcp_address()) as server:
        yield server


@contextmanager
def logged(server: Server, text: str) -> Iterator[None]:
    """What is done makes the server say this once more."""
    before = server.log.read_text().count(text)
    yield
    wait_until(lambda: server.log.read_text().count(text) > before, f"{text!r} in the log")


# The upgrade.


@pytest.mark.parametrize("number", [*range(2, 13), 99, 0xFFFFFFFF])
def test_every_option_but_starttls_and_abort_needs_tls_where_it_is_required(
    required: Server, number: int
) -> None:
    with Wire(required.address) as wire:
        wire.greet()
        answer = wire.haggle(number, b"")[-1]
        if number in (Option.STARTTLS, Option.ABORT):
            assert answer.kind == Reply.ACK
        else:
            assert answer.kind == Reply.ERR_TLS_REQD
            assert wire.haggle(Option.STARTTLS)[-1].kind == Reply.ACK


def test_export_name_in_the_clear_is_cut_off_where_tls_is_required(required: Server) -> None:
    with Wire(required.address) as wire:
        wire.greet()
        wire.send(option(Option.EXPORT_NAME, b""))
        assert wire.is_closed_by_server()


def test_starttls_is_unknown_without_a_certificate(image: Path, tmp_path: Path) -> None:
    with nbdserve("-f", "raw", image, directory=tmp_path) as server, Wire(server.address) as wire:
        wire.greet()
        assert wire.haggle(Option.STARTTLS)[-1].kind == Reply.ERR_UNSUP
        assert wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK


def test_starttls_with_data_and_a_second_one_are_invalid(required: Server, identities: Identities) -> None:
    with Wire(required.address) as wire:
        wire.greet()
        assert wire.haggle(Option.STARTTLS, b"x")[-1].kind == Reply.ERR_INVALID
        assert wire.haggle(Option.STARTTLS)[-1].kind == Reply.ACK
        encrypt(wire, client_context(identities.nobody))
        for _ in range(2):
            assert wire.haggle(Option.STARTTLS)[-1].kind == Reply.ERR_INVALID
        assert wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK


def test_nothing_that_was_agreed_in_the_clear_counts_inside_tls(
    optional: Server, identities: Identities
) -> None:
    contexts = meta_query("", "base:allocation")
    with Wire(optional.address) as wire:
        wire.greet()
        assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        assert wire.haggle(Option.SET_META_CONTEXT, contexts)[-1].kind == Reply.ACK
        assert wire.haggle(Option.STARTTLS)[-1].kind == Reply.ACK
        encrypt(wire, client_context(identities.nobody))
        assert wire.haggle(Option.SET_META_CONTEXT, contexts)[-1].kind == Reply.ERR_INVALID
        assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        assert wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK
        wire.send(request(Command.BLOCK_STATUS, 0, 4096, cookie=5))
        assert wire.chunk().kind == 0x8001, "the meta context of the clear must not be in force"


def test_plaintext_sent_together_with_starttls_never_reaches_the_session(
    required: Server, optional: Server, identities: Identities
) -> None:
    for server, answer in ((required, Reply.ERR_TLS_REQD), (optional, Reply.ACK)):
        with Wire(server.address) as wire:
            wire.greet()
            wire.send(option(Option.STARTTLS), option(Option.LIST))
            assert wire.option_reply().kind == Reply.ERR_INVALID
            # The server goes on in the clear, so what was injected is answered there.
            replies = [wire.option_reply()]
            while replies[-1].kind == Reply.SERVER:
                replies.append(wire.option_reply())
            assert (replies[-1].option, replies[-1].kind) == (Option.LIST, answer)
            assert wire.haggle(Option.STARTTLS)[-1].kind == Reply.ACK
            encrypt(wire, client_context(identities.nobody))
            assert wire.haggle(Option.LIST)[-1].kind == Reply.ACK


def test_plaintext_sent_after_starttls_breaks_the_handshake(required: Server, identities: Identities) -> None:
    with logged(required, "TLS handshake failed"), Wire(required.address) as wire:
        wire.greet()
        assert wire.haggle(Option.STARTTLS)[-1].kind == Reply.ACK
        wire.send(option(Option.ABORT))
        with pytest.raises((ssl.SSLError, ConnectionError)):
            encrypt(wire, client_context(identities.nobody))


def test_plaintext_inside_a_running_session_ends_it(
    required: Server, identities: Identities, image: Path
) -> None:
    before = image.read_bytes()
    wire = started(required, identities.nobody)
    assert wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK
    with socket.socket(fileno=wire.socket.detach()) as naked:
        naked.sendall(request(Command.WRITE, 0, data=b"in the clear"))
        naked.settimeout(60)
        with suppress(ConnectionResetError):
            while naked.recv(4096):
                pass
    assert image.read_bytes() == before
    required.process.wait_for_line("WRONG_VERSION_NUMBER")


# Clients that go away, or never come to the point.


def _greeted(wire: Wire, identities: Identities) -> None:
    wire.greet()


def _acknowledged(wire: Wire, identities: Identities) -> None:
    wire.greet()
    wire.haggle(Option.STARTTLS)


def _in_client_hello(wire: Wire, identities: Identities) -> None:
    _acknowledged(wire, identities)
    wire.send(bytes.fromhex("16030100a5010000a10303") + bytes(20))


def _encrypted(wire: Wire, identities: Identities) -> None:
    _acknowledged(wire, identities)
    encrypt(wire, client_context(identities.nobody))


def _in_an_option(wire: Wire, identities: Identities) -> None:
    _encrypted(wire, identities)
    wire.send(option(Option.GO, b"abc", length=100))


def _in_transmission(wire: Wire, identities: Identities) -> None:
    _encrypted(wire, identities)
    assert wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK


def _in_a_request(wire: Wire, identities: Identities) -> None:
    _in_transmission(wire, identities)
    wire.send(request(Command.READ, 0, 512)[:20])


def _in_a_payload(wire: Wire, identities: Identities) -> None:
    _in_transmission(wire, identities)
    wire.send(request(Command.WRITE, 0, data=bytes(MIB))[: 300 * KIB])


def _in_a_reply(wire: Wire, identities: Identities) -> None:
    _in_transmission(wire, identities)
    wire.send(*[request(Command.READ, 0, MIB) for _ in range(32)])
    wire.receive(10)


STAGES: list[Callable[[Wire, Identities], None]] = [
    _greeted,
    _acknowledged,
    _in_client_hello,
    _encrypted,
    _in_an_option,
    _in_transmission,
    _in_a_request,
    _in_a_payload,
    _in_a_reply,
]


def threads(server: Server) -> int:
    """How many threads the server has; each client has one."""
    return len(list(Path(f"/proc/{server.pid}/task").iterdir()))


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__.strip("_"))
def test_a_client_may_go_away_at_any_time(
    required: Server, identities: Identities, stage: Callable[[Wire, Identities], None]
) -> None:
    with started(required, identities.nobody) as other:
        assert other.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK
        before = threads(required)
        for reset in (False, True):
            with Wire(required.address) as wire:
                stage(wire, identities)
                if reset:
                    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wait_until(lambda: threads(required) <= before, "the server has forgotten them")
        other.send(request(Command.READ, 0, 512))
        assert other.simple_reply().error == 0
        other.receive(512)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\x16\x03\x01\xff\xff" + b"\xff" * 5000]
)
def test_garbage_instead_of_a_client_hello_ends_with_that_client(
    required: Server, identities: Identities, garbage: bytes
) -> None:
    with logged(required, "TLS handshake failed"), Wire(required.address) as wire:
        _acknowledged(wire, identities)
        wire.send(garbage)
        with suppress(ConnectionResetError):
            while wire.socket.recv(4096):
                pass
    assert check("nbdinfo", "--size", secure(required, identities.nobody)) == f"{ODD_SIZE}\n"


def test_a_slow_handshake_is_cut_off_when_its_time_is_over(
    identities: Identities, image: Path, tmp_path: Path
) -> None:
    options = [f"--tls-certificates={identities.server}", "--handshake-timeout=1"]
    with nbdserve("-f", "raw", *options, image, directory=tmp_path, at=free_tcp_address()) as server:
        for stage in (_acknowledged, _in_client_hello, _in_an_option):
            with Wire(server.address) as wire:
                begun = time.monotonic()
                stage(wire, identities)
                assert wire.is_closed_by_server()
                assert time.monotonic() - begun > 0.5
        with Wire(server.address) as wire:
            begun = time.monotonic()
            _in_client_hello(wire, identities)
            with pytest.raises(ConnectionError):
                wire.send_slowly(bytes(1000), pause=0.05)
            assert time.monotonic() - begun > 0.5
        assert server.log.read_text().count("no export chosen within 1 s") == 4
