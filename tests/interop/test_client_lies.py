"""Servers whose replies are not what was asked for: never success, whatever stock clients make of them."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdserve.client import Client, connect
from nbdserve.common.errors import ConnectError
from nbdserve.common.uri import parse_uri
from nbdserve.protocol.extents import Extent
from tests.support.disks import KIB, MIB, random_bytes
from tests.support.liar import NOTHING, Answer, Chunks, all_data, data, hole, lying, status, whole
from tests.support.overlays import LAYOUTS, Layout, make_overlay, overlay
from tests.support.processes import wait_until
from tests.support.servers import nbdserve
from tests.support.wire import Command

SIZE = MIB
HALF = 32 * KIB
CONTENT = random_bytes(SIZE // 2) + bytes(SIZE // 2)


def nothing(disk: bytes, offset: int, length: int) -> Chunks:
    """Not one byte."""
    return [NOTHING]


def part(disk: bytes, offset: int, length: int) -> Chunks:
    """All but the last sector."""
    return [data(disk, offset, length - 512), NOTHING] if length > 512 else [NOTHING]


def gap(disk: bytes, offset: int, length: int) -> Chunks:
    """All but a sector in the middle, which libnbd and qemu-img take for enough."""
    middle = length // 2
    return [data(disk, offset, middle - 1), data(disk, offset + middle, length - middle), NOTHING]


def twice_and_never(disk: bytes, offset: int, length: int) -> Chunks:
    """As many bytes as were asked for, the first half twice and the second never."""
    half = length // 2
    return [data(disk, offset, half), data(disk, offset, half), data(disk, offset, length - 2 * half)]


def twice(disk: bytes, offset: int, length: int) -> Chunks:
    """All of it, and all of it once more."""
    return [data(disk, offset, length), data(disk, offset, length)]


def overlapping(disk: bytes, offset: int, length: int) -> Chunks:
    """A byte of what was told before is told to be a hole."""
    return [data(disk, offset, length), hole(offset + length - 1, 1)]


def overlapping_backwards(disk: bytes, offset: int, length: int) -> Chunks:
    """The second half first, then a byte too many."""
    half = length // 2
    return [data(disk, offset + half, length - half), data(disk, offset, half + 1)]


def part_of_holes(disk: bytes, offset: int, length: int) -> Chunks:
    """Holes at both ends, and nothing between."""
    return [hole(offset, length // 4), hole(offset + length // 2, length - length // 2)]


def empty_chunk(disk: bytes, offset: int, length: int) -> Chunks:
    """All of it, and a chunk of nothing."""
    return [data(disk, offset, length), data(disk, offset, 0)]


def empty_hole(disk: bytes, offset: int, length: int) -> Chunks:
    """All of it, and a hole of nothing."""
    return [hole(offset, 0), data(disk, offset, length)]


def outside(disk: bytes, offset: int, length: int) -> Chunks:
    """A byte that was not asked for."""
    return [data(disk, offset + 1, length)]


def another_kind(disk: bytes, offset: int, length: int) -> Chunks:
    """What belongs to another request."""
    return [status((length, 0))]


def unknown_kind(disk: bytes, offset: int, length: int) -> Chunks:
    """What no protocol knows."""
    return [(99, b"?"), data(disk, offset, length)]


LIES: list[Answer] = [
    nothing,
    part,
    gap,
    twice_and_never,
    twice,
    overlapping,
    overlapping_backwards,
    part_of_holes,
    empty_chunk,
    empty_hole,
    outside,
    another_kind,
    unknown_kind,
]


def shuffled(disk: bytes, offset: int, length: int) -> Chunks:
    """Pieces of all lengths in any order, zeros as holes."""
    chance, pieces, begin = random.Random(offset), [], offset
    while begin < offset + length:
        count = min(chance.choice([1, 7, 512, 4 * KIB]), offset + length - begin)
        is_zero = not any(disk[begin : begin + count])
        pieces.append(hole(begin, count) if is_zero else data(disk, begin, count))
        begin += count
    chance.shuffle(pieces)
    return [*pieces, NOTHING]


def in_order(disk: bytes, offset: int, length: int) -> Chunks:
    """A byte, and the rest, which is the last chunk of its reply."""
    if length == 1:
        return whole(disk, offset, length)
    return [data(disk, offset, 1), data(disk, offset + 1, length - 1)]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test opens; closed with it."""
    with ExitStack() as opened:
        yield opened


def read(client: Client, offset: int, length: int) -> bytes:
    """One request, answered."""
    buffer = bytearray(b"\xee" * length)
    client.start_read(offset, memoryview(buffer)).result(20)
    return bytes(buffer)


@pytest.mark.parametrize("lie", LIES)
def test_a_read_that_is_not_covered_exactly_once_is_an_error(lie: Answer, tmp_path: Path) -> None:
    with lying(CONTENT, tmp_path, read=lie) as (_, address), connect(parse_uri(address.uri())) as client:
        with pytest.raises(OSError, match="broke the protocol") as failed:
            read(client, 4 * KIB, HALF)
        assert failed.value.errno == errno.EPROTO
        assert str(client.uri) in str(failed.value)


@pytest.mark.parametrize("answer", [shuffled, in_order, whole])
def test_a_read_may_be_answered_in_any_pieces_and_order(answer: Answer, tmp_path: Path) -> None:
    with lying(CONTENT, tmp_path, read=answer) as (_, address), connect(parse_uri(address.uri())) as client:
        for offset, length in ((0, 1), (SIZE // 2 - 5 * KIB, 10 * KIB), (3, HALF), (SIZE - 1, 1)):
            assert read(client, offset, length) == CONTENT[offset : offset + length]


def test_a_simple_reply_to_a_read_is_an_error_where_structured_ones_were_agreed_on(tmp_path: Path) -> None:
    with (
        lying(CONTENT, tmp_path, simple=Command.READ) as (_, address),
        connect(parse_uri(address.uri())) as client,
    ):
        with pytest.raises(OSError, match="broke the protocol") as failed:
            read(client, 0, 4 * KIB)
        assert failed.value.errno == errno.EPROTO


ABOUT: dict[str, Answer] = {
    "nothing": lambda disk, offset, length: [NOTHING],
    "an empty extent": lambda disk, offset, length: [status((0, 0), (length, 0))],
    "behind the range": lambda disk, offset, length: [status((length, 0), (512, 3))],
    "twice": lambda disk, offset, length: [status((length, 0)), status((length, 3)), NOTHING],
    "of another context": lambda disk, offset, length: [status((length, 3), context=99)],
    "not of whole extents": lambda disk, offset, length: [(5, b"\0" * 13)],
    "data": lambda disk, offset, length: [data(disk, offset, 16), NOTHING],
}


@pytest.mark.parametrize("lie", ABOUT)
def test_a_block_status_that_makes_no_sense_is_an_error(lie: str, tmp_path: Path) -> None:
    with (
        lying(CONTENT, tmp_path, about=ABOUT[lie]) as (_, address),
        connect(parse_uri(address.uri())) as client,
        pytest.raises(OSError, match="broke the protocol") as failed,
    ):
        client.start_extents(0, HALF, "base:allocation").result(20)
    assert failed.value.errno == errno.EPROTO


def test_a_simple_reply_to_block_status_is_an_error(tmp_path: Path) -> None:
    with (
        lying(CONTENT, tmp_path, simple=Command.BLOCK_STATUS) as (_, address),
        connect(parse_uri(address.uri())) as client,
        pytest.raises(OSError, match="broke the protocol"),
    ):
        client.start_extents(0, HALF, "base:allocation").result(20)


def test_the_last_extent_may_reach_beyond_the_range(tmp_path: Path) -> None:
    def more(disk: bytes, offset: int, length: int) -> Chunks:
        return [status((length - 512, 0), (4 * KIB, 3))]

    with lying(CONTENT, tmp_path, about=more) as (_, address), connect(parse_uri(address.uri())) as client:
        runs = client.start_extents(0, HALF, "base:allocation").result(20)
        assert runs == [Extent(HALF - 512, 0), Extent(4 * KIB, 3)]


# The whole way: a guest behind the overlay, a client behind nbdserve.


def is_distrusted(told: dict[str, object]) -> bool:
    """Whether ``status`` says of a source that it is not used."""
    return not told["connected"] and "broke the protocol" in str(told["trouble"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.sampled(8)
def test_a_guest_gets_an_error_from_a_source_that_lies_and_nothing_is_kept(
    lie: Answer, layout: Layout, tmp_path: Path, stack: ExitStack
) -> None:
    liar, address = stack.enter_context(lying(CONTENT, tmp_path, read=lie))
    image = make_overlay(tmp_path / "overlay", layout, SIZE, address.uri())
    daemon = stack.enter_context(overlay(image, "--reconnect-timeout=30", directory=tmp_path))
    guest = stack.enter_context(daemon.guest())
    for offset in (0, 0, 256 * KIB):
        with pytest.raises(OSError) as failed:
            guest.read(offset, 64 * KIB)
        assert failed.value.errno == errno.EIO
    told = daemon.status()
    assert told["local"] == 0
    assert is_distrusted(told["sources"][0])
    with daemon.monitor() as qmp:
        qmp.execute("block-stream", device="disk")
    assert "broke the protocol" in daemon.wait_for_status(phase="failed")["error"]
    assert daemon.log.read_text().count("not used any more") == 1
    asked = liar.answered
    with pytest.raises(OSError):
        guest.read(512 * KIB, 64 * KIB)
    assert liar.answered == asked


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lie", [twice_and_never, outside])
def test_another_source_is_used_instead_of_one_that_lies(
    lie: Answer, layout: Layout, tmp_path: Path, stack: ExitStack
) -> None:
    _, liar = stack.enter_context(lying(CONTENT, tmp_path, read=lie))
    honest, other = stack.enter_context(lying(CONTENT, tmp_path))
    image = make_overlay(tmp_path / "overlay", layout, SIZE, liar.uri())
    backings = [f"--backing={address.uri()}" for address in (liar, other)]
    daemon = stack.enter_context(overlay(image, *backings, directory=tmp_path))
    guest = stack.enter_context(daemon.guest())
    wait_until(lambda: all(told["connected"] for told in daemon.status()["sources"]), "both are connected")
    for offset in range(0, 256 * KIB, 64 * KIB):
        assert guest.read(offset, 64 * KIB) == CONTENT[offset : offset + 64 * KIB]
    with daemon.monitor() as qmp:
        qmp.execute("block-stream", device="disk")
    daemon.wait_for_status(phase="done")
    assert guest.read(0, SIZE) == CONTENT
    assert honest.answered


def zeros_that_are_none(disk: bytes, offset: int, length: int) -> Chunks:
    """An extent of zeros behind an empty one."""
    return [status((0, 0), (length, 3))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lie", ABOUT)
@pytest.mark.sampled(5)
def test_a_job_fails_at_a_block_status_that_makes_no_sense_and_marks_nothing(
    lie: str, layout: Layout, tmp_path: Path, stack: ExitStack
) -> None:
    _, address = stack.enter_context(lying(CONTENT, tmp_path, about=ABOUT[lie]))
    image = make_overlay(tmp_path / "overlay", layout, SIZE, address.uri())
    daemon = stack.enter_context(overlay(image, "--stream", directory=tmp_path))
    told = daemon.wait_for_status(phase="failed")
    assert "broke the protocol" in told["error"]
    assert told["local"] == 0
    assert is_distrusted(told["sources"][0])


def test_an_operator_who_has_mended_the_server_resumes(tmp_path: Path, stack: ExitStack) -> None:
    answers: list[Answer] = [gap]

    def now(disk: bytes, offset: int, length: int) -> Chunks:
        return answers[0](disk, offset, length)

    _, address = stack.enter_context(lying(CONTENT, tmp_path, read=now))
    image = make_overlay(tmp_path / "overlay", "flat", SIZE, address.uri())
    daemon = stack.enter_context(overlay(image, "--stream", directory=tmp_path))
    daemon.wait_for_status(phase="failed")
    answers[0] = whole
    with daemon.monitor() as qmp:
        qmp.execute("block-job-resume", device="stream")
    daemon.wait_for_status(phase="done")
    with daemon.guest() as guest:
        assert guest.read(0, SIZE) == CONTENT


def check_proxy(
    asks: Callable[[Client], object], tmp_path: Path, read: Answer = whole, about: Answer = all_data
) -> None:
    """What is asked of nbdserve in front of a server that lies fails, ever after, and is logged once."""
    with (
        lying(CONTENT, tmp_path, read=read, about=about) as (liar, address),
        nbdserve(address.uri(), directory=tmp_path) as proxy,
        connect(parse_uri(proxy.uri())) as client,
    ):
        for _ in range(3):
            with pytest.raises(OSError) as failed:
                asks(client)
            assert failed.value.errno == errno.EIO
        assert liar.answered == 1
        assert proxy.process.output().count("the server is not used any more") == 1, proxy.process.output()


def test_a_size_that_no_disk_can_have_is_told_as_that(tmp_path: Path) -> None:
    for size in (1 << 63, (1 << 64) - 4096, (1 << 64) - 1):
        with lying(CONTENT, tmp_path, size=size) as (_, address):
            with pytest.raises(ConnectError) as refused:
                connect(parse_uri(address.uri()))
            assert str(refused.value).endswith(": the server tells a size that no disk can have")


@pytest.mark.parametrize("lie", LIES)
def test_nbdserve_passes_no_read_on_that_is_not_covered_exactly_once(lie: Answer, tmp_path: Path) -> None:
    check_proxy(lambda client: read(client, 4 * KIB, HALF), tmp_path, read=lie)


@pytest.mark.parametrize("lie", ABOUT)
def test_nbdserve_passes_no_block_status_on_that_makes_no_sense(lie: str, tmp_path: Path) -> None:
    check_proxy(
        lambda client: client.start_extents(0, HALF, "base:allocation").result(20), tmp_path, about=ABOUT[lie]
    )
