"""Extended headers end to end: 64-bit lengths, payloads that are announced, and filters for block status.

The authority is the branch extension-ext-header of proto.md. libnbd 1.14, qemu-nbd 7.2 and nbdkit do not
speak it, so every byte is the test's own.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import KIB, MIB, random_bytes
from tests.support.servers import Server, nbdserve
from tests.support.wire import (
    Command,
    Flag,
    Kind,
    Option,
    Reply,
    Wire,
    export_query,
    extended_request,
    meta_query,
    option,
)

CONTEXTS = ("base:allocation", "qemu:allocation-depth")
SIZE = 8 * 2**40
ADVERTISED = 64 * MIB  # the longest payload of one request
BLOCK_STATUS_PAYLOAD = 1 << 12


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """8 TiB, of which the first MiB is data."""
    path = tmp_path / "large.img"
    path.write_bytes(random_bytes(MIB))
    with path.open("r+b") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def server(image: Path, tmp_path: Path) -> Iterator[Server]:
    """A writable server."""
    with nbdserve("-f", "raw", image, directory=tmp_path) as running:
        yield running


def wanted(length: int, *contexts: int) -> bytes:
    """The payload of a block status request: what it is about, in bytes, and the ids of some contexts."""
    return struct.pack(f">Q{len(contexts)}I", length, *contexts)


def test_every_reply_has_an_extended_header_with_the_offset_of_its_request(
    server: Server, image: Path
) -> None:
    with image.open("rb") as file:
        content = file.read(MIB)
    with Wire(server.address) as wire:
        wire.go(extended=True, contexts=CONTEXTS)
        for offset, sent in enumerate(
            [
                extended_request(Command.READ, 0, 512),
                extended_request(Command.WRITE, 1, data=b"x"),
                extended_request(Command.TRIM, 2, 512),
                extended_request(Command.CACHE, 3, 512),
                extended_request(Command.WRITE_ZEROES, 4, 1),
                extended_request(Command.BLOCK_STATUS, 5, 512),
                extended_request(Command.FLUSH, 6),
                extended_request(99, 7),
                extended_request(Command.READ, 8, 512, flags=0x8000),
            ]
        ):
            wire.send(sent)
            chunks = wire.chunks()
            assert {chunk.offset for chunk in chunks} == {offset}
            assert chunks[-1].error == (0 if offset < 7 else errno.EINVAL)
        wire.send(extended_request(Command.READ, 1000, 512 * KIB))
        data = b"".join(chunk.payload[8:] for chunk in wire.chunks() if chunk.kind == Kind.OFFSET_DATA)
        assert data == content[1000 : 1000 + 512 * KIB]
        wire.send(extended_request(Command.READ, SIZE, 1, cookie=5))
        (refused,) = wire.chunks()
        assert (refused.cookie, refused.offset, refused.error) == (5, SIZE, errno.EINVAL)
        assert refused.message


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES, Command.CACHE])
def test_an_effect_may_be_longer_than_32_bits_can_say(server: Server, image: Path, command: Command) -> None:
    flags = Flag.FAST_ZERO if command == Command.WRITE_ZEROES else Flag.NONE
    with Wire(server.address) as wire:
        wire.go(extended=True)
        wire.send(extended_request(command, 4096, SIZE - 4096, flags=flags))
        assert wire.chunks()[-1].error == 0
    assert image.stat().st_size == SIZE
    if command != Command.CACHE:
        assert image.stat().st_blocks * 512 <= 64 * KIB, "all but the first block has become a hole"


def test_one_extent_may_be_longer_than_32_bits_can_say(server: Server) -> None:
    with Wire(server.address) as wire:
        base, depth = wire.go(extended=True, contexts=CONTEXTS)
        wire.send(extended_request(Command.BLOCK_STATUS, 0, SIZE))
        chunks = wire.chunks()
        assert {chunk.kind for chunk in chunks} == {Kind.BLOCK_STATUS_EXT}
        assert dict(chunk.extents for chunk in chunks) == {
            base: [(MIB, 0), (SIZE - MIB, 3)],
            depth: [(SIZE, 1)],
        }


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES, Command.BLOCK_STATUS, Command.READ])
def test_64_bit_lengths_never_wrap_around(server: Server, command: Command) -> None:
    with Wire(server.address) as wire:
        wire.go(extended=True, contexts=CONTEXTS)
        for offset, length in [(2**64 - 1, 2), (2**63, 2**63), (4096, 2**64 - 4096), (0, 2**64 - 1)]:
            wire.send(extended_request(command, offset, length))
            error = wire.chunks()[-1].error
            if command == Command.READ and length > ADVERTISED:
                assert error == errno.EOVERFLOW
            else:
                assert error == (errno.ENOSPC if command == Command.WRITE_ZEROES else errno.EINVAL)
        wire.send(extended_request(Command.BLOCK_STATUS, 0, 512, flags=Flag.REQ_ONE))
        assert wire.chunks()[0].extents[1] == [(512, 0)]


def test_block_status_tells_only_of_the_contexts_that_its_payload_names(server: Server) -> None:
    with Wire(server.address) as wire:
        base, depth = wire.go(extended=True, contexts=CONTEXTS)
        for ids in ([base], [depth], [depth, base]):
            wire.send(extended_request(Command.BLOCK_STATUS, 0, data=wanted(SIZE, *ids)))
            assert {chunk.extents[0] for chunk in wire.chunks()} == set(ids)
        wire.send(extended_request(Command.BLOCK_STATUS, 0, flags=Flag.REQ_ONE, data=wanted(512, base)))
        assert [chunk.extents for chunk in wire.chunks()] == [(base, [(512, 0)])]


def test_a_filter_that_does_not_fit_is_consumed_and_invalid(server: Server) -> None:
    with Wire(server.address) as wire:
        base, depth = wire.go(extended=True, contexts=CONTEXTS)
        unknown = base + depth + 1
        for payload in [
            wanted(512, base, base),
            wanted(512, unknown),
            wanted(512, base, unknown),
            wanted(512),
            wanted(0, base),
            wanted(SIZE + 1, base),
            wanted(2**64 - 1, base),
            wanted(512, base) + b"x",
            b"\x21\xe4\x1c\x71",
            bytes(MIB),
        ]:
            wire.send(extended_request(Command.BLOCK_STATUS, 0, cookie=1, data=payload))
            wire.send(extended_request(Command.FLUSH, cookie=2))
            refused, flushed = wire.chunks()[-1], wire.chunks()[-1]
            assert (refused.cookie, refused.error) == (1, errno.EINVAL), payload[:32]
            assert (flushed.cookie, flushed.error) == (2, 0)


def test_a_payload_that_a_command_does_not_take_is_consumed_and_invalid(server: Server, image: Path) -> None:
    with Wire(server.address) as wire:
        wire.go(extended=True, contexts=CONTEXTS)
        others = {Command.READ, Command.FLUSH, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, 99}
        for command in others:
            wire.send(extended_request(command, 0, cookie=1, data=b"\x21\xe4\x1c\x71" * 1024))
            wire.send(extended_request(Command.FLUSH, cookie=2))
            refused, flushed = wire.chunks()[-1], wire.chunks()[-1]
            assert (refused.cookie, refused.error) == (1, errno.EINVAL), command
            assert (flushed.cookie, flushed.error) == (2, 0), command
    with image.open("rb") as file:
        assert file.read(MIB) == random_bytes(MIB)


@pytest.mark.parametrize("length", [ADVERTISED + 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("command", [Command.WRITE, Command.BLOCK_STATUS, Command.TRIM, 99])
def test_a_payload_longer_than_any_may_be_ends_the_connection(
    server: Server, command: int, length: int
) -> None:
    with Wire(server.address) as wire, Wire(server.address) as bystander:
        wire.go(extended=True)
        bystander.go(extended=True)
        wire.send(extended_request(Command.FLUSH, cookie=1))
        wire.send(extended_request(command, 0, length, flags=Flag.PAYLOAD_LEN))
        assert wire.chunks()[-1].cookie == 1
        assert wire.is_closed_by_server()
        bystander.send(extended_request(Command.FLUSH))
        assert bystander.chunks()[-1].error == 0


def test_the_longest_payload_is_written_and_read_back(server: Server) -> None:
    content = random_bytes(MIB) * 64
    with Wire(server.address) as wire:
        wire.go(extended=True)
        wire.send(extended_request(Command.WRITE, 2**42, data=content))
        assert wire.chunks()[-1].error == 0
        wire.send(extended_request(Command.READ, 2**42, ADVERTISED, flags=Flag.DF))
        (chunk,) = wire.chunks()
        assert chunk.payload == struct.pack(">Q", 2**42) + content


def test_a_write_that_does_not_announce_its_payload_is_understood(server: Server, image: Path) -> None:
    """A client must set the flag; one that does not has sent the data all the same."""
    with Wire(server.address) as wire:
        wire.go(extended=True)
        wire.send(extended_request(Command.WRITE, 0, 5, cookie=1), b"hello")
        wire.send(extended_request(Command.FLUSH, cookie=2))
        assert [wire.chunks()[-1].cookie for _ in range(2)] == [1, 2]
    with image.open("rb") as file:
        assert file.read(5) == b"hello"


def test_a_compact_request_is_not_understood_any_more(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.go(extended=True)
        wire.send(struct.pack(">IHHQQI", 0x25609513, 0, Command.FLUSH, 1, 0, 0), bytes(4))
        assert wire.is_closed_by_server()


def flags_of(replies_payload: bytes) -> int:
    """The transmission flags in the information item EXPORT."""
    kind, _, flags = struct.unpack(">HQH", replies_payload)
    assert kind == 0
    return int(flags)


def test_filters_are_advertised_only_with_extended_headers_and_a_context(server: Server) -> None:
    for extended, contexts in [(False, True), (True, False), (True, True)]:
        with Wire(server.address) as wire:
            wire.greet()
            number = Option.EXTENDED_HEADERS if extended else Option.STRUCTURED_REPLY
            assert wire.haggle(number)[-1].kind == Reply.ACK
            if contexts:
                assert wire.haggle(Option.SET_META_CONTEXT, meta_query("", *CONTEXTS))[-1].kind == Reply.ACK
            told = [
                flags_of(wire.haggle(step, export_query(""))[0].data) for step in (Option.INFO, Option.GO)
            ]
            assert [bool(flags & BLOCK_STATUS_PAYLOAD) for flags in told] == [extended and contexts] * 2


def test_extended_headers_are_agreed_once_and_take_the_place_of_structured_replies(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.greet()
        for number, data, kind in [
            (Option.EXTENDED_HEADERS, b"x", Reply.ERR_INVALID),
            (Option.STRUCTURED_REPLY, b"", Reply.ACK),
            (Option.EXTENDED_HEADERS, b"", Reply.ACK),
            (Option.EXTENDED_HEADERS, b"", Reply.ERR_INVALID),
            (Option.STRUCTURED_REPLY, b"", Reply.ERR_EXT_HEADER_REQD),
        ]:
            assert wire.haggle(number, data)[-1].kind == kind
        wire.send(option(Option.EXPORT_NAME))
        assert wire.is_closed_by_server()


def test_with_simple_replies_only_there_are_no_extended_headers(image: Path, tmp_path: Path) -> None:
    with (
        nbdserve("--simple-replies", "-f", "raw", image, directory=tmp_path) as server,
        Wire(server.address) as wire,
    ):
        wire.greet()
        assert wire.haggle(Option.EXTENDED_HEADERS)[-1].kind == Reply.ERR_UNSUP
        assert wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK
