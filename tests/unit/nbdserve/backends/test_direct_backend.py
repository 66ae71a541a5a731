"""Reading and writing past the page cache: edges that are not aligned, odd sizes, and writers that meet."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.backends.direct import ALIGNMENT, DirectBackend, Ranges
from nbdserve.backends.file import FileBackend
from nbdserve.backends.offset import Slice
from nbdserve.common.errors import ImageError
from tests.support.disks import KIB, MIB, random_bytes, random_disk

ODD = 1 * MIB + 3 * KIB + 77


def opened(path: Path, *, read_only: bool = False, part: Slice = Slice()) -> DirectBackend:  # noqa: B008
    """The backend, or no test where the file system has no direct access."""
    try:
        return DirectBackend(path, read_only=read_only, part=part)
    except ImageError as error:
        pytest.skip(str(error))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image whose size no block divides."""
    random_disk(tmp_path / "disk.img", ODD)
    return tmp_path / "disk.img"


@pytest.fixture
def backend(image: Path) -> Iterator[DirectBackend]:
    """The image, opened."""
    opening = opened(image)
    yield opening
    opening.close()


def read(backend: FileBackend, offset: int, length: int) -> bytes:
    """Read a range."""
    data = bytearray(length)
    backend.read_into(offset, memoryview(data))
    return bytes(data)


def ranges(size: int, count: int, seed: int) -> Iterator[tuple[int, int]]:
    """Ranges that like to begin and end near the borders of blocks."""
    chance = random.Random(seed)
    for _ in range(count):
        points = [
            min(
                size,
                max(
                    0, chance.randrange(0, size + ALIGNMENT, ALIGNMENT) + chance.choice((-513, -1, 0, 1, 512))
                ),
            )
            for _ in range(2)
        ]
        yield min(points), max(points)


def test_every_range_reads_as_it_is_in_the_file(backend: DirectBackend, image: Path) -> None:
    content = image.read_bytes()
    assert backend.size == ODD
    assert read(backend, 0, ODD) == content
    assert read(backend, ODD - 1, 1) == content[-1:]
    for begin, end in ranges(ODD, 200, seed=1):
        assert read(backend, begin, end - begin) == content[begin:end]


@pytest.mark.parametrize("part", [Slice(), Slice(4096), Slice(1000, 900_001)])
def test_every_write_changes_its_range_and_nothing_else(image: Path, part: Slice) -> None:
    content = bytearray(image.read_bytes())
    backend = opened(image, part=part)
    for number, (begin, end) in enumerate(ranges(backend.size, 200, seed=2)):
        data = random_bytes(end - begin, seed=number)
        match number % 4:
            case 0:
                backend.zero(begin, end - begin, fua=False, may_trim=number % 8 == 0, fast=False)
                data = bytes(end - begin)
            case 1:
                backend.write(begin, data, fua=True)
            case _:
                backend.write(begin, data, fua=False)
        content[part.offset + begin : part.offset + end] = data
        assert read(backend, begin, end - begin) == data
    backend.flush()
    backend.close()
    assert image.read_bytes() == content


def test_writers_of_parts_of_one_block_do_not_undo_one_another(backend: DirectBackend, image: Path) -> None:
    """Eight writers, each with bytes of its own in every block, and two that write whole blocks elsewhere."""
    blocks, share, rounds = 16, ALIGNMENT // 8, 25

    def work(index: int) -> None:
        for turn in range(rounds):
            for block in range(blocks):
                offset = block * ALIGNMENT + index * share
                backend.write(offset, bytes([index * rounds + turn]) * share, fua=False)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wanted = b"".join(bytes([index * rounds + rounds - 1]) * share for index in range(8))
    assert image.read_bytes()[: blocks * ALIGNMENT] == wanted * blocks


def test_it_does_go_past_the_page_cache(image: Path) -> None:
    backend = opened(image, read_only=True)
    os.posix_fadvise(backend.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    flags = {
        int(line.split()[1], 8)
        for entry in Path("/proc/self/fdinfo").iterdir()
        if os.path.realpath(f"/proc/self/fd/{entry.name}") == str(image)
        for line in entry.read_text().splitlines()
        if line.startswith("flags:")
    }
    assert any(number & os.O_DIRECT for number in flags)
    backend.close()
    assert not any(os.path.realpath(link) == str(image) for link in Path("/proc/self/fd").iterdir())


def test_nothing_is_served_at_once(backend: DirectBackend) -> None:
    before = read(backend, 0, 4096)
    buffer = bytearray(4096)
    assert not backend.read_now(0, memoryview(buffer))
    assert not backend.write_now(0, b"x" * 4096)
    assert not any(buffer)
    assert read(backend, 0, 4096) == before


def test_who_wants_to_be_alone_waits_for_the_others_and_they_for_him() -> None:
    held = Ranges()
    order: list[str] = []
    inside = threading.Event()

    def alone() -> None:
        inside.wait()
        with held.held(0, 4096, alone=True):
            order.append("alone")

    worker = threading.Thread(target=alone)
    worker.start()
    with held.held(0, 8192, alone=False), held.held(0, 4096, alone=False):
        inside.set()
        time.sleep(0.05)
        order.append("others")
        with held.held(4096, 8192, alone=False):
            pass
    worker.join(120)
    assert order == ["others", "alone"]
