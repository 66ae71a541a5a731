"""Where the servers that operators know stumble, nbdserve does not: the same bytes to each of them.

What is expected of the others is what Debian 12's packages do (qemu-nbd 7.2, nbdkit 1.32, nbd-server 3.24).
A line that fails after an upgrade is good news: change it here and in docs/conformance.md.
"""

from __future__ import annotations

import errno
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import versions
from tests.support.disks import KIB, MIB, ODD_SIZE, random_disk
from tests.support.servers import Server, nbd_server, nbdkit, nbdserve, qemu_nbd
from tests.support.wire import (
    Command,
    Flag,
    Option,
    Reply,
    Wire,
    export_query,
    meta_query,
    option,
    request,
)

EXPORT = "disk"
SIZE = 2 * MIB
NBDSERVE, QEMU_NBD, NBDKIT, NBD_SERVER = "nbdserve", "qemu-nbd", "nbdkit", "nbd-server"
PATIENCE = 60.0  # seconds after which a server that says nothing is taken to hang


@contextmanager
def serving(name: str, image: Path, directory: Path) -> Iterator[Server]:
    """One of the servers, with one export of a raw image."""
    match name:
        case "nbdserve":
            running = nbdserve("-f", "raw", "-x", EXPORT, image, directory=directory)
        case "qemu-nbd":
            running = qemu_nbd("-f", "raw", "-x", EXPORT, image, directory=directory)
        case "nbdkit":
            running = nbdkit("file", image, directory=directory)
        case _:
            running = nbd_server(image, directory=directory, export=EXPORT)
    with running as server:
        yield server


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 2 MiB."""
    path = tmp_path / "disk.img"
    random_disk(path, SIZE)
    return path


def transmission(server: Server, *, structured: bool = False) -> Wire:
    """A client that has chosen the export."""
    wire = Wire(server.address, PATIENCE)
    wire.go(EXPORT, structured=structured)
    return wire


def size_told(wire: Wire, step: Option) -> int:
    """The size that INFO or GO tells, in bytes."""
    return told(wire, step)[0]


def told(wire: Wire, step: Option) -> tuple[int, int]:
    """The size in bytes and the transmission flags that INFO or GO tells."""
    replies = wire.haggle(step, export_query(EXPORT))
    assert replies[-1].kind == Reply.ACK, replies
    (item,) = [reply.data for reply in replies if reply.data[:2] == b"\0\0"]
    _, size, flags = struct.unpack(">HQH", item)
    return size, flags


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (NBDSERVE, errno.ENOSPC),
        (QEMU_NBD, errno.EINVAL),
        (NBDKIT, errno.ENOSPC),
        (NBD_SERVER, errno.ENOSPC),
    ],
)
def test_a_write_past_the_end_finds_no_space(name: str, error: int, image: Path, tmp_path: Path) -> None:
    with serving(name, image, tmp_path) as server, transmission(server) as wire:
        wire.send(request(Command.WRITE, SIZE - 1, data=b"xy"))
        assert wire.simple_reply().error == error


@pytest.mark.parametrize(
    ("name", "excess"), [(NBDSERVE, 0), (QEMU_NBD, -ODD_SIZE % 512), (NBDKIT, 0), (NBD_SERVER, 0)]
)
def test_an_odd_size_is_exact(name: str, excess: int, tmp_path: Path) -> None:
    image = tmp_path / "odd.img"
    random_disk(image, ODD_SIZE)
    with serving(name, image, tmp_path) as server, Wire(server.address, PATIENCE) as wire:
        wire.greet()
        assert size_told(wire, Option.GO) == ODD_SIZE + excess


@pytest.mark.parametrize(
    ("name", "told"), [(NBDSERVE, SIZE), (QEMU_NBD, SIZE), (NBDKIT, SIZE), (NBD_SERVER, 0)]
)
def test_info_tells_the_size(name: str, told: int, image: Path, tmp_path: Path) -> None:
    with serving(name, image, tmp_path) as server, Wire(server.address, PATIENCE) as wire:
        wire.greet()
        assert size_told(wire, Option.INFO) == told
        assert size_told(wire, Option.GO) == SIZE


@pytest.mark.parametrize("data", [b"", b"\0\0\0\x40disk\0\0"], ids=["empty", "lying"])
@pytest.mark.parametrize("name", [NBDSERVE, QEMU_NBD, NBDKIT])
def test_a_length_in_info_that_does_not_fit_is_invalid_and_nothing_hangs(
    name: str, data: bytes, image: Path, tmp_path: Path
) -> None:
    """The option has no room for a name, or for one as long as it claims. nbd-server loses its step."""
    with serving(name, image, tmp_path) as server, Wire(server.address, PATIENCE) as wire:
        wire.greet()
        assert wire.haggle(Option.INFO, data)[-1].kind == Reply.ERR_INVALID
        assert size_told(wire, Option.GO) == SIZE


@pytest.mark.parametrize(("name", "refused"), [(NBDSERVE, True), (QEMU_NBD, True), (NBDKIT, False)])
def test_contexts_of_an_unknown_export_are_refused(
    name: str, refused: bool, image: Path, tmp_path: Path
) -> None:
    with serving(name, image, tmp_path) as server, Wire(server.address, PATIENCE) as wire:
        wire.greet()
        assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        last = wire.haggle(Option.SET_META_CONTEXT, meta_query("unknown", "base:allocation"))[-1]
        assert last.kind == (Reply.ERR_UNKNOWN if refused else Reply.ACK)


@pytest.mark.parametrize(("name", "ids"), [(NBDSERVE, 1), (QEMU_NBD, 1), (NBDKIT, 2)])
def test_a_context_that_is_asked_for_twice_has_one_id(
    name: str, ids: int, image: Path, tmp_path: Path
) -> None:
    with serving(name, image, tmp_path) as server, Wire(server.address, PATIENCE) as wire:
        wire.greet()
        assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        query = meta_query(EXPORT, "base:allocation", "base:allocation")
        *contexts, last = wire.haggle(Option.SET_META_CONTEXT, query)
        assert last.kind == Reply.ACK
        assert len(contexts) == ids


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (NBDSERVE, Reply.ERR_INVALID),
        (QEMU_NBD, Reply.ERR_INVALID),
        (NBDKIT, Reply.ACK if versions.nbdkit() < (1, 42) else Reply.ERR_INVALID),
    ],
)
def test_structured_replies_are_agreed_only_once(name: str, kind: Reply, image: Path, tmp_path: Path) -> None:
    with serving(name, image, tmp_path) as server, Wire(server.address, PATIENCE) as wire:
        wire.greet()
        assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
        assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == kind


@pytest.mark.parametrize(
    ("name", "acknowledged"), [(NBDSERVE, True), (QEMU_NBD, True), (NBDKIT, True), (NBD_SERVER, False)]
)
def test_abort_is_acknowledged(name: str, acknowledged: bool, image: Path, tmp_path: Path) -> None:
    with serving(name, image, tmp_path) as server, Wire(server.address, PATIENCE) as wire:
        wire.greet()
        if acknowledged:
            assert wire.haggle(Option.ABORT)[-1].kind == Reply.ACK
        else:
            wire.send(option(Option.ABORT))
        assert wire.is_closed_by_server()


@pytest.mark.parametrize(
    ("name", "closed"), [(NBDSERVE, True), (QEMU_NBD, True), (NBDKIT, True), (NBD_SERVER, False)]
)
def test_unknown_client_flags_end_the_connection(
    name: str, closed: bool, image: Path, tmp_path: Path
) -> None:
    with serving(name, image, tmp_path) as server, Wire(server.address, PATIENCE) as wire:
        wire.greet(0x83)
        if closed:
            assert wire.is_closed_by_server()
        else:
            assert size_told(wire, Option.GO) == SIZE


READS, LENGTH = 64, 64 * KIB


def answers_before_goodbye(server: Server) -> list[int]:
    """Send many reads and a goodbye at once; the error values of the replies that come."""
    errors: list[int] = []
    with transmission(server) as wire:
        wire.send(*(request(Command.READ, 0, LENGTH) for _ in range(READS)), request(Command.DISC))
        try:
            # Whether it is closed then is another question: nbdkit 1.42 leaves it open after one in nine.
            while len(errors) < READS:
                errors.append(wire.simple_reply().error)
                if not errors[-1]:
                    wire.receive(LENGTH)
        except (EOFError, ConnectionError):
            pass
    return errors


@pytest.mark.parametrize("name", [NBDSERVE, NBDKIT, NBD_SERVER])
def test_goodbye_waits_for_the_requests_before_it(name: str, image: Path, tmp_path: Path) -> None:
    """qemu-nbd drops the last replies in most rounds; nbdkit makes an ESHUTDOWN of one in some."""
    with serving(name, image, tmp_path) as server:
        for errors in [answers_before_goodbye(server) for _ in range(10)]:
            assert len(errors) == READS
            assert set(errors) <= ({0, errno.ESHUTDOWN} if name == NBDKIT else {0})


LONGEST = {NBDSERVE: 64 * MIB, QEMU_NBD: 32 * MIB, NBDKIT: 64 * MIB}


@pytest.mark.parametrize(
    ("name", "error"), [(NBDSERVE, errno.EINVAL), (QEMU_NBD, None), (NBDKIT, errno.ENOMEM)]
)
def test_a_write_that_is_too_long_is_refused_in_step(name: str, error: int | None, tmp_path: Path) -> None:
    image = tmp_path / "large.img"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(128 * MIB)
    answers: list[tuple[int, int]] = []
    with serving(name, image, tmp_path) as server, transmission(server) as wire:
        try:
            wire.send(request(Command.WRITE, cookie=1, data=bytes(LONGEST[name] + 1)))
            wire.send(request(Command.FLUSH, cookie=2))
            while len(answers) < 2:
                reply = wire.simple_reply()
                answers.append((reply.cookie, reply.error))
        except (EOFError, ConnectionError):
            assert error is None, "the connection was closed"
    assert answers == ([] if error is None else [(1, error), (2, 0)])


@pytest.mark.parametrize(
    ("name", "error"), [(NBDSERVE, 0), (QEMU_NBD, 0), (NBDKIT, errno.EINVAL), (NBD_SERVER, 0)]
)
def test_a_read_of_nothing_succeeds(name: str, error: int, image: Path, tmp_path: Path) -> None:
    with serving(name, image, tmp_path) as server, transmission(server) as wire:
        wire.send(request(Command.READ, 0, 0))
        assert wire.simple_reply().error == error


@pytest.mark.parametrize(
    ("name", "error"),
    [(NBDSERVE, errno.EINVAL), (QEMU_NBD, errno.EINVAL), (NBDKIT, errno.EINVAL), (NBD_SERVER, 0)],
)
def test_a_flag_that_does_not_belong_to_a_command_is_invalid(
    name: str, error: int, image: Path, tmp_path: Path
) -> None:
    with serving(name, image, tmp_path) as server, transmission(server) as wire:
        wire.send(request(Command.READ, 0, 512, flags=Flag.NO_HOLE))
        assert wire.simple_reply().error == error


@pytest.mark.parametrize("name", [NBDSERVE, NBDKIT])
def test_a_fast_zero_that_was_not_advertised_harms_only_itself(
    name: str, image: Path, tmp_path: Path
) -> None:
    """nbd-server knows no fast zeroes, so neither do its proxies; nbdkit's file plugin has none either."""
    with nbd_server(image, directory=tmp_path, export=EXPORT) as upstream:
        running = (
            nbdserve("-x", EXPORT, upstream.uri(EXPORT), directory=tmp_path)
            if name == NBDSERVE
            else nbdkit("file", image, directory=tmp_path)
        )
        with running as server, Wire(server.address, PATIENCE) as wire:
            wire.greet()
            assert not told(wire, Option.GO)[1] & 1 << 11, "it is advertised"
            wire.send(request(Command.WRITE_ZEROES, 0, 4096, cookie=1, flags=Flag.FAST_ZERO))
            if name == NBDKIT:
                assert server.process.wait() == -signal.SIGABRT
            else:
                assert wire.simple_reply().error == errno.EINVAL
                wire.send(request(Command.FLUSH, cookie=2))
                assert wire.simple_reply().error == 0


def answer_after_sigterm(name: str, image: Path, directory: Path) -> int | None:
    """The error that a client's next request gets after SIGTERM; None when the connection closes instead."""
    with serving(name, image, directory) as server, transmission(server) as wire:
        server.process.signal(signal.SIGTERM)
        try:
            for _ in range(200):  # until the signal has arrived
                wire.send(request(Command.READ, 0, 512))
                if error := wire.simple_reply().error:
                    return error
                wire.receive(512)
                time.sleep(0.01)
        except (EOFError, ConnectionError):
            return None
    raise AssertionError("it goes on")


@pytest.mark.parametrize("name", [NBDSERVE, QEMU_NBD, NBDKIT])
def test_an_idle_client_of_a_server_that_stops_sees_the_connection_close(
    name: str, image: Path, tmp_path: Path
) -> None:
    """QEMU with ``reconnect-delay`` comes back after a closed connection; an error is the disk's to it.

    nbdkit answers ESHUTDOWN now and then.
    """
    rounds = {answer_after_sigterm(name, image, tmp_path) for _ in range(5)}
    assert rounds <= ({None, errno.ESHUTDOWN} if name == NBDKIT else {None})
