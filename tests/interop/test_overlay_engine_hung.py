"""A source that hangs keeps those waiting who need it, and nobody else."""

from __future__ import annotations

import random
import signal
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdserve.protocol.constants import CommandFlags
from tests.support.disks import KIB, MIB, random_bytes, random_disk
from tests.support.overlays import LAYOUTS, NONE, Guest, Layout, make_overlay, overlay
from tests.support.servers import nbdserve

SIZE = 16 * MIB
READ = 64 * KIB
SOON = 5.0
"""Seconds; a source counts as hung only after ten."""

both = pytest.mark.parametrize("layout", LAYOUTS)


def start_reads(guest: Guest, places: list[int]) -> list[tuple[int, bytearray, Future[None]]]:
    """Ask for what is at these places, and wait for nothing."""
    started = []
    for place in places:
        buffer = bytearray(READ)
        started.append((place, buffer, guest.client.start_read(place, memoryview(buffer))))
    return started


@both
def test_writes_and_flushes_of_guests_do_not_wait_for_reads_that_hang(layout: Layout, tmp_path: Path) -> None:
    content = bytearray(random_disk(tmp_path / "disk", SIZE))
    new = random_bytes(256 * KIB, seed=5)
    places = list(range(MIB, SIZE, READ))
    random.Random(1).shuffle(places)
    with ExitStack() as stack:
        source = stack.enter_context(nbdserve("--read-only", tmp_path / "disk", directory=tmp_path))
        image = make_overlay(tmp_path / "overlay", layout, SIZE, source.uri())
        daemon = stack.enter_context(overlay(image, directory=tmp_path))
        guests = [stack.enter_context(daemon.guest()) for _ in range(3)]
        assert guests[0].read(0, 4 * KIB) == content[: 4 * KIB]
        source.process.freeze()
        waiting = [start_reads(guest, places[64 * number :][:64]) for number, guest in enumerate(guests)]
        # Each kind of change, some of them where a read is under way; the last needs only what is here.
        for number, guest in enumerate(guests):
            begin = 256 * KIB * (4 * number + 4)
            guest.client.start_write(begin, new, NONE).result(SOON)
            guest.client.start_zero(begin + 256 * KIB, 128 * KIB, NONE).result(SOON)
            guest.client.start_write(begin + 512 * KIB, new[: 64 * KIB], CommandFlags.FUA).result(SOON)
            guest.client.start_trim(begin + 768 * KIB, 128 * KIB, NONE).result(SOON)
            guest.client.start_write(512 * number + 1, new[:99], CommandFlags.FUA).result(SOON)
            guest.client.start_flush().result(SOON)
            content[begin : begin + 256 * KIB] = new
            content[begin + 256 * KIB : begin + 384 * KIB] = bytes(128 * KIB)
            content[begin + 512 * KIB : begin + 576 * KIB] = new[: 64 * KIB]
            content[begin + 768 * KIB : begin + 896 * KIB] = bytes(128 * KIB)
            content[512 * number + 1 : 512 * number + 100] = new[:99]
        assert not all(future.done() for started in waiting for _, _, future in started)
        source.process.signal(signal.SIGCONT)
        for started in waiting:
            for _, _, future in started:
                future.result(120)
        assert guests[1].read(0, SIZE) == content
