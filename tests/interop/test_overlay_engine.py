"""The overlay's engine before a slow source: whose data wins, what is fetched, and who waits for it."""

from __future__ import annotations

import errno
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nbdserve.client import connect
from nbdserve.common.uri import parse_uri
from nbdserve.protocol.constants import CommandFlags
from tests.support.delay import delayed
from tests.support.disks import KIB, MIB, random_bytes, random_disk
from tests.support.overlays import (
    CLUSTER,
    LAYOUTS,
    NONE,
    Daemon,
    Guest,
    Layout,
    make_overlay,
    overlay,
    requests,
)
from tests.support.processes import Argument, wait_until
from tests.support.qed import poke, read_u64
from tests.support.servers import Server, UnixAddress, nbdkit

SIZE = 4 * MIB
LATER = 0.15
"""Seconds by which answers of the source come late."""

both = pytest.mark.parametrize("layout", LAYOUTS)

Change = Callable[[Guest, int, int], None]
"""What a guest does to a range (offset, length), so that it holds what AFTER says."""

NEW = random_bytes(MIB, seed=99)

CHANGES: dict[str, tuple[Change, bytes]] = {
    "write": (lambda guest, offset, length: guest.write(offset, NEW[:length]), NEW),
    "zero": (lambda guest, offset, length: guest.zero(offset, length), bytes(MIB)),
    "trim": (lambda guest, offset, length: guest.trim(offset, length), bytes(MIB)),
}


@contextmanager
def source(directory: Path, *filters: Argument) -> Iterator[tuple[bytes, Path, Server]]:
    """A random disk at an nbdkit with a log of its requests: content, log, server."""
    content = random_disk(directory / "source", SIZE)
    log = directory / "requests.log"
    argv: list[Argument] = ["--filter=log", *filters, "file", directory / "source", f"logfile={log}"]
    with nbdkit(*argv, directory=directory) as server:
        yield content, log, server


@contextmanager
def late_overlay(
    layout: Layout, directory: Path, *arguments: Argument
) -> Iterator[tuple[bytes, Path, Daemon]]:
    """An overlay whose source has read what is asked for long before the answer arrives: content, log."""
    with source(directory) as (content, log, server), ExitStack() as stack:
        assert isinstance(server.address, UnixAddress)
        link = stack.enter_context(delayed(server.address, LATER, directory))
        image = make_overlay(directory / "overlay", layout, SIZE, link.uri())
        daemon = stack.enter_context(overlay(image, "--connections=2", *arguments, directory=directory))
        daemon.wait_until_connected()
        yield content, log, daemon


def begin_to_read(guest: Guest, offset: int, length: int, log: Path) -> tuple[bytearray, Future[None]]:
    """Start a read, and return when the source has been asked for it."""
    before = len(requests(log))
    data = bytearray(length)
    started = guest.client.start_read(offset, memoryview(data))
    wait_until(lambda: len(requests(log)) > before, "the source is asked")
    return data, started


@both
def test_what_a_guest_changes_wins_over_a_fetch_that_is_under_way(layout: Layout, tmp_path: Path) -> None:
    """All kinds of changes, each to a part of a cluster of its own, of which a read is under way."""
    with late_overlay(layout, tmp_path) as (content, log, daemon), daemon.guest() as guest:
        expected = bytearray(content)
        place = 0
        for change, (apply, new) in CHANGES.items():
            for skipped, length in ((0, 64 * KIB), (4 * KIB, 4 * KIB), (2 * KIB + 512, 1536)):
                # Far from where the last read was, so that nothing has been read ahead.
                place += 320 * KIB
                offset = place + skipped
                _, reading = begin_to_read(guest, place, 64 * KIB, log)
                apply(guest, offset, length)
                reading.result(120)
                whole = offset % CLUSTER[layout] == 0 and length % CLUSTER[layout] == 0
                # A trim of less than a cluster is free to do nothing.
                if change != "trim" or whole or guest.read(offset, length) == bytes(length):
                    expected[offset : offset + length] = new[:length]
        assert guest.read(0, SIZE) == expected


@both
def test_what_a_guest_writes_wins_over_streaming_that_is_under_way(layout: Layout, tmp_path: Path) -> None:
    with late_overlay(layout, tmp_path) as (content, log, daemon), daemon.guest() as guest:
        expected = bytearray(content)
        with daemon.monitor() as qmp:
            qmp.execute("block-stream", device="disk")
            wait_until(lambda: requests(log), "the source is asked")
            for offset, length in ((0, 64 * KIB), (MIB, 4 * KIB), (2 * MIB + 512, 512)):
                guest.write(offset, NEW[:length])
                expected[offset : offset + length] = NEW[:length]
            guest.zero(3 * MIB, 64 * KIB)
            expected[3 * MIB : 3 * MIB + 64 * KIB] = bytes(64 * KIB)
            guest.trim(3 * MIB + 64 * KIB, 64 * KIB)
            expected[3 * MIB + 64 * KIB : 3 * MIB + 128 * KIB] = bytes(64 * KIB)
        daemon.wait_for_status(phase="done")
        assert guest.read(0, SIZE) == expected


def test_the_same_write_is_lost_by_nbdkits_copy_on_read_filter(tmp_path: Path) -> None:
    """The peer fails: its filter stores what it read over what was written meanwhile."""
    with source(tmp_path) as (content, log, server), ExitStack() as stack:
        assert isinstance(server.address, UnixAddress)
        link = stack.enter_context(delayed(server.address, LATER, tmp_path))
        argv: list[Argument] = ["--filter=cow", "nbd", f"uri={link.uri()}", "cow-on-read=true"]
        peer = stack.enter_context(nbdkit(*argv, directory=tmp_path))
        guest = Guest(stack.enter_context(connect(parse_uri(peer.uri()), timeout=60.0)))
        reader = Guest(stack.enter_context(connect(parse_uri(peer.uri()), timeout=60.0)))
        _, reading = begin_to_read(reader, 64 * KIB, 64 * KIB, log)
        guest.write(64 * KIB, NEW[: 64 * KIB])
        reading.result(120)
        lost = guest.read(64 * KIB, 64 * KIB)
        assert lost == content[64 * KIB : 128 * KIB]
        assert lost != NEW[: 64 * KIB]


@both
def test_guests_that_miss_the_same_cluster_make_one_fetch(layout: Layout, tmp_path: Path) -> None:
    with late_overlay(layout, tmp_path) as (content, log, daemon), ExitStack() as stack:
        guests = [stack.enter_context(daemon.guest()) for _ in range(8)]
        buffers = [bytearray(4 * KIB) for _ in range(32)]
        reading = [
            guests[number % 8].client.start_read(MIB + number % 16 * 4 * KIB, memoryview(buffer))
            for number, buffer in enumerate(buffers)
        ]
        for number, started in enumerate(reading):
            started.result(120)
            offset = MIB + number % 16 * 4 * KIB
            assert buffers[number] == content[offset : offset + 4 * KIB]
        # By place, as what is read ahead may be asked for first.
        first, *ahead = sorted((asked.offset, asked.length) for asked in requests(log))
        assert first == (MIB, 64 * KIB)
        assert all(offset >= MIB + 64 * KIB for offset, _ in ahead)


@both
def test_what_was_read_once_is_never_fetched_again(layout: Layout, tmp_path: Path) -> None:
    with source(tmp_path) as (content, log, server):
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        for _ in range(2):
            with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
                assert guest.read(0, SIZE) == content
        # After the restart a few blocks are compared, to know that it is still the same disk.
        again = sum(asked.length for asked in requests(log)) - SIZE
        assert 0 <= again <= 8 * 4 * KIB


@contextmanager
def hung(server: Server) -> Iterator[None]:
    """A source that answers nothing until the block ends."""
    server.process.freeze()
    try:
        yield
    finally:
        server.process.signal(signal.SIGCONT)


def test_whole_grains_are_written_without_waiting_for_a_source_that_hangs(tmp_path: Path) -> None:
    with source(tmp_path) as (content, _, server):
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, server.uri())
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            daemon.wait_until_connected()
            with hung(server):
                waiting = guest.client.start_read(3 * MIB, memoryview(bytearray(4 * KIB)))
                guest.write(0, NEW[: 4 * KIB])
                guest.write(MIB, NEW)  # longer than what is served in line
                guest.zero(64 * KIB, 4 * KIB)
                guest.trim(68 * KIB, 4 * KIB)
                guest.flush()
                assert guest.read(MIB, MIB) == NEW
                assert not waiting.done()
            waiting.result(120)
            expected = NEW[: 4 * KIB] + content[4 * KIB : 64 * KIB] + bytes(8 * KIB) + content[72 * KIB : MIB]
            assert guest.read(0, MIB) == expected


def test_a_disks_last_piece_of_a_grain_is_a_whole_one(tmp_path: Path) -> None:
    random_disk(tmp_path / "source", MIB + 1536)
    with nbdkit("file", tmp_path / "source", directory=tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", "flat", MIB + 1536, server.uri())
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            daemon.wait_until_connected()
            with hung(server):
                guest.write(MIB, NEW[:1536])
                assert guest.read(MIB, 1536) == NEW[:1536]


@pytest.mark.parametrize(
    ("offset", "length", "fetched"),
    [
        (512, 512, [0]),
        (4096 - 512, 1024, [0, 4096]),
        (100 * KIB + 1, 200 * KIB, [100 * KIB, 300 * KIB]),
        (8 * KIB, 4 * KIB + 1, [12 * KIB]),
        (8 * KIB, 8 * KIB, []),
        (SIZE - 512, 512, [SIZE - 4 * KIB]),
    ],
)
def test_a_write_fetches_only_the_grains_at_its_edges(
    offset: int, length: int, fetched: list[int], tmp_path: Path
) -> None:
    with source(tmp_path) as (content, log, server):
        image = make_overlay(tmp_path / "overlay", "flat", SIZE, server.uri())
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            guest.write(offset, NEW[:length])
            assert [(asked.offset, asked.length) for asked in requests(log)] == [
                (place, 4 * KIB) for place in fetched
            ]
            expected = content[:offset] + NEW[:length] + content[offset + length :]
            assert guest.read(0, SIZE) == expected


@both
def test_a_guests_read_does_not_wait_for_the_speed_limit_of_streaming(layout: Layout, tmp_path: Path) -> None:
    with source(tmp_path) as (content, _, server):
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        with (
            overlay(image, "--stream", "--speed=8192", directory=tmp_path) as daemon,
            daemon.guest() as guest,
        ):
            daemon.wait_until_connected()
            time.sleep(0.5)  # the job has its first piece, and waits seconds for the next
            begun = time.monotonic()
            for offset in range(0, MIB, 64 * KIB):
                assert guest.read(offset, 4 * KIB) == content[offset : offset + 4 * KIB]
            assert time.monotonic() - begun < 60  # at that speed they would come in 128 s


@both
def test_without_copy_on_read_nothing_is_stored(layout: Layout, tmp_path: Path) -> None:
    with source(tmp_path) as (content, log, server):
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        with overlay(image, "--copy-on-read=off", directory=tmp_path) as daemon, daemon.guest() as guest:
            for _ in range(2):
                assert guest.read(4096, MIB + 512) == content[4096 : MIB + 4096 + 512]
            guest.write(2 * MIB, NEW[: 64 * KIB])
            assert guest.read(2 * MIB - 512, 65 * KIB) == (
                content[2 * MIB - 512 : 2 * MIB] + NEW[: 64 * KIB] + content[2 * MIB + 64 * KIB :][:512]
            )
            assert daemon.status()["local"] == 64 * KIB
        assert sum(asked.length for asked in requests(log)) == 2 * (MIB + 512) + 1024


@both
def test_a_range_outside_the_disk_is_refused_and_does_no_harm(layout: Layout, tmp_path: Path) -> None:
    with source(tmp_path) as (content, _, server):
        image = make_overlay(tmp_path / "overlay", layout, SIZE, server.uri())
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            with pytest.raises(OSError) as refused:
                guest.client.start_write(SIZE - 512, NEW[:1024], NONE).result(120)
            assert refused.value.errno in (errno.EINVAL, errno.ENOSPC)
            assert guest.read(SIZE - KIB, KIB) == content[-KIB:]


def test_a_damaged_table_fails_what_needs_it_and_the_guest_stays_connected(tmp_path: Path) -> None:
    with source(tmp_path) as (_, _, server):
        image = make_overlay(tmp_path / "overlay", "qed", SIZE, server.uri())
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            guest.write(0, NEW[: 64 * KIB])
        l1_offset = read_u64(image, 40)
        poke(image, read_u64(image, l1_offset) + 8 * 4, 12345)  # no multiple of a cluster
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            for length in (512, 256 * KIB):
                with pytest.raises(OSError) as failed:
                    guest.read(256 * KIB, length)
                assert failed.value.errno == errno.EIO
            for length in (512, 192 * KIB + 512):
                with pytest.raises(OSError) as failed:
                    guest.write(256 * KIB, NEW[:length], CommandFlags.FUA)
                assert failed.value.errno == errno.EIO
