"""The transmission phase to the letter: what proto.md says of each command, over real sockets.

What stock clients do is in test_nbdserve_clients, extended headers are in test_nbdserve_extended.
"""

from __future__ import annotations

import errno
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.disks import KIB, MIB, ODD_SIZE, random_bytes, random_disk
from tests.support.servers import Server, nbdserve
from tests.support.wire import Chunk, Command, Flag, Kind, Wire, request

SIZE = 4 * MIB
ADVERTISED = 64 * MIB  # the longest payload of one request
LONGEST = 2**32 - 1


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """1 MiB of data, 2 MiB of nothing, 1 MiB of data."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(random_bytes(MIB, 1))
        file.seek(3 * MIB)
        file.write(random_bytes(MIB, 2))
    return path


@pytest.fixture
def server(image: Path, tmp_path: Path) -> Iterator[Server]:
    """A writable server."""
    with nbdserve("-f", "raw", image, directory=tmp_path) as running:
        yield running


def assembled(chunks: list[Chunk], offset: int, length: int) -> bytes:
    """The data of a read, put together; the chunks must cover all of it once and nothing else."""
    data = bytearray(length)
    covered: list[tuple[int, int]] = []
    for chunk in chunks:
        assert chunk.kind in (Kind.NONE, Kind.OFFSET_DATA, Kind.OFFSET_HOLE)
        if chunk.kind == Kind.NONE:
            assert not chunk.payload
            continue
        start = int.from_bytes(chunk.payload[:8], "big") - offset
        if chunk.kind == Kind.OFFSET_DATA:
            count = len(chunk.payload) - 8
            data[start : start + count] = chunk.payload[8:]
        else:
            assert len(chunk.payload) == 12
            count = int.from_bytes(chunk.payload[8:], "big")
        covered.append((start, start + count))
    covered.sort()
    assert [start for start, _ in covered] == [0, *(end for _, end in covered[:-1])]
    assert covered[-1][1] == length
    return bytes(data)


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (1 * MIB - 1, 2), (100, 1), (777, SIZE - 1000)])
def test_a_read_in_chunks_covers_every_byte_once(
    server: Server, image: Path, offset: int, length: int
) -> None:
    with Wire(server.address) as wire:
        wire.go(structured=True)
        wire.send(request(Command.READ, offset, length, cookie=7))
        chunks = wire.chunks()
    assert {chunk.cookie for chunk in chunks} == {7}
    assert assembled(chunks, offset, length) == image.read_bytes()[offset : offset + length]


def test_holes_of_a_file_are_read_without_sending_their_zeroes(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.go(structured=True)
        wire.send(request(Command.READ, 0, SIZE))
        chunks = wire.chunks()
    holes = sum(
        int.from_bytes(chunk.payload[8:], "big") for chunk in chunks if chunk.kind == Kind.OFFSET_HOLE
    )
    sent = sum(len(chunk.payload) for chunk in chunks)
    assert holes >= 2 * MIB - 512 * KIB
    assert sent < SIZE - holes + KIB


@pytest.mark.parametrize("length", [512, 64 * KIB, 256 * KIB + 1, SIZE])
@pytest.mark.sampled(1)
def test_a_read_that_must_not_be_fragmented_is_one_chunk_of_data(
    server: Server, image: Path, length: int
) -> None:
    """Across the border between data and a hole, too; the zeroes are in it then."""
    offset = min(MIB - 256, SIZE - length)
    with Wire(server.address) as wire:
        wire.go(structured=True)
        wire.send(request(Command.READ, offset, length, flags=Flag.DF))
        chunks = wire.chunks()
    assert [chunk.kind for chunk in chunks if chunk.payload] == [Kind.OFFSET_DATA]
    assert assembled(chunks, offset, length) == image.read_bytes()[offset : offset + length]


def test_errors_come_with_a_message_and_change_nothing(server: Server, image: Path) -> None:
    before = image.read_bytes()
    with Wire(server.address) as wire:
        wire.go(structured=True)
        wire.send(request(Command.WRITE, SIZE - 1, cookie=3, data=b"xy"))
        (chunk,) = wire.chunks()
    assert (chunk.cookie, chunk.kind, chunk.error) == (3, Kind.ERROR, errno.ENOSPC)
    assert str(SIZE) in chunk.message
    assert len(chunk.payload) == 6 + len(chunk.message.encode())
    assert image.read_bytes() == before


PAST_END = {
    Command.READ: errno.EINVAL,
    Command.WRITE: errno.ENOSPC,
    Command.TRIM: errno.EINVAL,
    Command.CACHE: errno.EINVAL,
    Command.WRITE_ZEROES: errno.ENOSPC,
    Command.BLOCK_STATUS: errno.EINVAL,
}


BEYOND = [(SIZE - 1, 2), (SIZE, 1), (SIZE + 1, 1), (2**63, 512), (2**64 - 512, 512), (2**64 - 1, SIZE)]


@pytest.mark.parametrize("command", PAST_END)
@pytest.mark.sampled(2)
def test_no_request_goes_past_the_end_nor_wraps_around(server: Server, image: Path, command: Command) -> None:
    before = image.read_bytes()
    with Wire(server.address) as wire:
        wire.go(contexts=("base:allocation",))
        for offset, length in BEYOND:
            data = bytes(length) if command == Command.WRITE else b""
            wire.send(request(command, offset, length, cookie=1, data=data))
            refused = wire.chunks()[-1]
            assert (refused.cookie, refused.error) == (1, PAST_END[command]), (offset, length)
        wire.send(request(Command.READ, 100, 100, cookie=2))
        assert assembled(wire.chunks(), 100, 100) == before[100:200]
    assert image.read_bytes() == before


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
def test_a_change_of_a_read_only_export_is_not_permitted(
    image: Path, tmp_path: Path, command: Command
) -> None:
    with nbdserve("-r", "-f", "raw", image, directory=tmp_path) as server, Wire(server.address) as wire:
        wire.go()
        for flags in (0, Flag.FUA):
            data = b"x" * 512 if command == Command.WRITE else b""
            wire.send(request(command, 0, 512, cookie=1, flags=flags, data=data))
            assert wire.simple_reply().error == errno.EPERM
        wire.send(request(Command.READ, 0, 512))
        assert wire.simple_reply().error == 0


UNKNOWN = [
    (Command.RESIZE, 0),
    (99, 0),
    (0xFFFF, 0xFFFF),
    (Command.READ, 0x8000),
    (Command.READ, Flag.NO_HOLE),
    (Command.READ, Flag.PAYLOAD_LEN),
    (Command.WRITE, Flag.PAYLOAD_LEN),
    (Command.WRITE, Flag.DF),
    (Command.WRITE, 0x4000),
    (Command.TRIM, Flag.FAST_ZERO),
    (Command.FLUSH, Flag.REQ_ONE),
]


@pytest.mark.parametrize("structured", [True, False])
def test_what_is_not_known_is_invalid_and_the_stream_stays_in_step(
    server: Server, image: Path, structured: bool
) -> None:
    before = image.read_bytes()
    with Wire(server.address) as wire:
        wire.go(structured=structured)
        for command, flags in UNKNOWN:
            # A payload that is not consumed would be taken for requests.
            data = b"\x25\x60\x95\x13" * 128 if command == Command.WRITE else b""
            wire.send(request(command, 0, 512, cookie=1, flags=flags, data=data))
            wire.send(request(Command.FLUSH, cookie=2))
            refused = wire.chunks()[-1] if structured else wire.simple_reply()
            assert (refused.cookie, refused.error) == (1, errno.EINVAL), (command, flags)
            served = wire.chunks()[-1] if structured else wire.simple_reply()
            assert (served.cookie, served.error) == (2, 0), (command, flags)
    assert image.read_bytes() == before


def test_fua_is_harmless_on_any_command(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.go(contexts=("base:allocation",))
        for command in set(Command) - {Command.DISC, Command.RESIZE}:
            data = b"x" * 512 if command == Command.WRITE else b""
            wire.send(request(command, 0, 512, flags=Flag.FUA, data=data))
            assert not wire.chunks()[-1].error, command


@pytest.mark.parametrize("structured", [True, False])
def test_requests_for_nothing_are_answered_and_nobody_is_cut_off(
    server: Server, image: Path, structured: bool
) -> None:
    before = image.read_bytes()
    commands = [Command.READ, Command.WRITE, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES]
    with Wire(server.address) as wire:
        wire.go(contexts=("base:allocation",) if structured else ())
        for offset in (0, 12345, SIZE, SIZE + 1, 2**64 - 1):
            for command in [*commands, Command.BLOCK_STATUS]:
                wire.send(request(command, offset, 0, cookie=command))
                answer = wire.chunks()[-1] if structured else wire.simple_reply()
                assert answer.cookie == command
                if offset <= SIZE and command != Command.BLOCK_STATUS:
                    assert not answer.error
        wire.send(request(Command.FLUSH, cookie=99))
        assert (wire.chunks()[-1] if structured else wire.simple_reply()).cookie == 99
    assert image.read_bytes() == before


@pytest.mark.parametrize("length", [32 * MIB, 64 * MIB])
def test_payloads_up_to_what_is_advertised_work_in_both_directions(tmp_path: Path, length: int) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"")
    with image.open("r+b") as file:
        file.truncate(length + 1)
    content = random.Random(length).randbytes(MIB) * (length // MIB)
    with nbdserve("-f", "raw", image, directory=tmp_path) as server, Wire(server.address) as wire:
        wire.go()
        wire.send(request(Command.WRITE, 1, data=content))
        assert wire.simple_reply().error == 0
        wire.send(request(Command.READ, 1, length))
        assert wire.simple_reply().error == 0
        assert wire.receive(length) == content


@pytest.mark.parametrize("structured", [True, False])
def test_a_payload_of_one_byte_more_is_refused_and_the_stream_stays_in_step(
    tmp_path: Path, structured: bool
) -> None:
    image = tmp_path / "disk.img"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(ADVERTISED * 2)
    with nbdserve("-f", "raw", image, directory=tmp_path) as server, Wire(server.address) as wire:
        wire.go(structured=structured)
        wire.send(request(Command.WRITE, 0, cookie=1, data=b"\xee" * (ADVERTISED + 1)))
        wire.send(request(Command.READ, 0, ADVERTISED + 1, cookie=2), request(Command.FLUSH, cookie=3))
        answers = [wire.chunks()[-1] if structured else wire.simple_reply() for _ in range(3)]
    # A read in chunks may be too large to send; no other request may be answered with EOVERFLOW.
    too_large = errno.EOVERFLOW if structured else errno.EINVAL
    assert [(each.cookie, each.error) for each in answers] == [(1, errno.EINVAL), (2, too_large), (3, 0)]
    assert image.stat().st_blocks == 0, "nothing was written"


def test_goodbye_waits_until_every_request_before_it_is_answered(server: Server, image: Path) -> None:
    reads, writes = 100, 100
    flushes = range(1000, 1016)
    before = image.read_bytes()
    with Wire(server.address) as wire:
        wire.go(structured=True)
        wire.send(
            *(request(Command.WRITE, index * KIB, cookie=index, data=b"w" * KIB) for index in range(writes)),
            *(request(Command.READ, 3 * MIB, 4 * KIB, cookie=500 + index) for index in range(reads)),
            *(request(Command.FLUSH, cookie=index) for index in flushes),
            request(Command.DISC, cookie=9999),
        )
        answered: set[int] = set()
        while len(answered) < reads + writes + len(flushes):
            chunks = wire.chunks()
            assert not chunks[-1].error
            answered.add(chunks[-1].cookie)
            if chunks[-1].cookie in range(500, 500 + reads):
                assert assembled(chunks, 3 * MIB, 4 * KIB) == before[3 * MIB : 3 * MIB + 4 * KIB]
        assert wire.is_closed_by_server()
    assert answered == {*range(writes), *range(500, 500 + reads), *flushes}
    assert image.read_bytes()[: writes * KIB] == b"w" * writes * KIB


def test_what_follows_a_goodbye_is_not_served(server: Server, image: Path) -> None:
    before = image.read_bytes()
    with Wire(server.address) as wire:
        wire.go()
        wire.send(request(Command.DISC), request(Command.WRITE, 0, data=b"too late"))
        assert wire.is_closed_by_server()
    assert image.read_bytes() == before


def test_a_cookie_may_be_used_by_many_requests_at_once(server: Server, image: Path) -> None:
    content = image.read_bytes()
    with Wire(server.address) as wire:
        wire.go()
        wire.send(*[request(Command.READ, index * 1000, 1000, cookie=2**64 - 1) for index in range(50)])
        for index in range(50):
            reply = wire.simple_reply()
            assert (reply.cookie, reply.error) == (2**64 - 1, 0)
            assert wire.receive(1000) == content[index * 1000 : (index + 1) * 1000]


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Server]:
    """8 TiB of a sparse file, with 64 KiB of data at each of 0, 1 GiB, 3 GiB and the last bytes."""
    image = tmp_path / "large.img"
    with image.open("wb") as file:
        for offset in (0, 2**30, 3 * 2**30, 2**43 - 64 * KIB):
            file.seek(offset)
            file.write(random_bytes(64 * KIB))
    with nbdserve("-f", "raw", image, directory=tmp_path) as running:
        yield running


def test_block_status_tells_all_extents_of_all_contexts(large: Server) -> None:
    with Wire(large.address) as wire:
        base, depth = wire.go(contexts=("base:allocation", "qemu:allocation-depth"))
        assert base != depth
        wire.send(request(Command.BLOCK_STATUS, 0, LONGEST))
        statuses = dict(chunk.extents for chunk in wire.chunks())
    assert set(statuses) == {base, depth}
    data, gib = 64 * KIB, 2**30
    lengths = [data, gib - data, data, 2 * gib - data, data, gib - data - 1]
    assert statuses[base] == [(length, 0 if index % 2 == 0 else 3) for index, length in enumerate(lengths)]
    assert statuses[depth][0][1] == 1
    assert sum(length for length, _ in statuses[depth]) <= LONGEST


def test_req_one_tells_one_extent_no_longer_than_was_asked(large: Server) -> None:
    with Wire(large.address) as wire:
        wire.go(contexts=("base:allocation", "qemu:allocation-depth"))
        for offset, length, expected in [
            (0, LONGEST, (64 * KIB, 0)),
            (64 * KIB, LONGEST, (2**30 - 64 * KIB, 3)),
            (64 * KIB, 512, (512, 3)),
        ]:
            wire.send(request(Command.BLOCK_STATUS, offset, length, flags=Flag.REQ_ONE))
            statuses = [chunk.extents[1] for chunk in wire.chunks()]
            assert statuses[0] == [expected]
            assert all(len(extents) == 1 and extents[0][0] <= length for extents in statuses)


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES, Command.CACHE, Command.BLOCK_STATUS])
def test_an_effect_may_be_as_long_as_32_bits_can_say(large: Server, command: Command) -> None:
    with Wire(large.address) as wire:
        wire.go(contexts=("base:allocation",))
        wire.send(request(command, 2**41, LONGEST))
        last = wire.chunks()[-1]
        assert not last.error, last.message
        if command == Command.BLOCK_STATUS:
            assert {flags for _, flags in last.extents[1]} == {3}


def test_block_status_without_a_context_is_invalid(server: Server) -> None:
    with Wire(server.address) as wire:
        wire.go(structured=True)
        wire.send(request(Command.BLOCK_STATUS, 0, SIZE, cookie=1), request(Command.FLUSH, cookie=2))
        assert wire.chunks()[-1].error == errno.EINVAL
        assert wire.chunks()[-1].error == 0


def test_the_last_odd_byte_can_be_read_written_and_described(tmp_path: Path) -> None:
    image = tmp_path / "odd.img"
    content = random_disk(image, ODD_SIZE)
    with nbdserve("-f", "raw", image, directory=tmp_path) as server, Wire(server.address) as wire:
        wire.go(contexts=("base:allocation",))
        wire.send(request(Command.READ, ODD_SIZE - 1, 1))
        assert assembled(wire.chunks(), ODD_SIZE - 1, 1) == content[-1:]
        wire.send(request(Command.WRITE, ODD_SIZE - 1, data=b"!"))
        assert not wire.chunks()[-1].error
        wire.send(request(Command.BLOCK_STATUS, ODD_SIZE - 1, 1))
        assert wire.chunks()[-1].extents[1] == [(1, 0)]
    assert image.read_bytes() == content[:-1] + b"!"


def test_a_fast_zero_is_refused_untouched_where_the_file_system_cannot(tmp_path: Path) -> None:
    """tmpfs punches holes but has no way to zero a range that keeps its space."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as image:
        content = random_bytes(MIB)
        image.write(content)
        image.flush()
        with nbdserve("-f", "raw", image.name, directory=tmp_path) as server, Wire(server.address) as wire:
            wire.go()
            kept = Flag.FAST_ZERO | Flag.NO_HOLE
            wire.send(request(Command.WRITE_ZEROES, 0, 64 * KIB, flags=kept))
            assert wire.simple_reply().error == errno.ENOTSUP
            assert Path(image.name).read_bytes() == content
            for flags in (Flag.FAST_ZERO, Flag.NO_HOLE):
                wire.send(request(Command.WRITE_ZEROES, 64 * KIB, 64 * KIB, flags=flags))
                assert wire.simple_reply().error == 0
            zeroed = content[: 64 * KIB] + bytes(64 * KIB) + content[128 * KIB :]
            assert Path(image.name).read_bytes() == zeroed
