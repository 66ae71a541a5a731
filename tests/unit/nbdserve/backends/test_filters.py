"""Filters over a raw file: what goes through them and what they change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.backends.file import FileBackend
from nbdserve.backends.filters import Caching, Filter, KeepSpace, Unsafe, WriteThrough, ZeroDetector
from nbdserve.protocol.constants import Command
from nbdserve.protocol.offers import ALLOCATION_DEPTH, BASE_ALLOCATION
from tests.support.disks import KIB, MIB, random_disk


class Watched(FileBackend):
    """A raw file that remembers what was asked of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, read_only=False)
        self.asked: list[tuple[object, ...]] = []

    def write(self, offset: int, data: bytes | bytearray | memoryview, fua: bool) -> None:
        self.asked.append(("write", len(data), fua))
        super().write(offset, data, fua)

    def zero(self, offset: int, length: int, fua: bool, may_trim: bool, fast: bool) -> None:
        self.asked.append(("zero", length, fua, may_trim))
        super().zero(offset, length, fua, may_trim, fast)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        self.asked.append(("trim", length, fua))
        super().trim(offset, length, fua)

    def log_writes(self) -> None:
        self.asked.append(("log_writes",))

    def flush(self) -> None:
        self.asked.append(("flush",))
        super().flush()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Watched]:
    """A file of 2 MiB."""
    random_disk(tmp_path / "disk.img", 2 * MIB)
    backend = Watched(tmp_path / "disk.img")
    yield backend
    backend.close()


def change_everything(backend: Filter) -> None:
    """Every kind of change, without asking for durability."""
    backend.write(0, b"x" * 512, fua=False)
    backend.zero(4096, 4096, fua=False, may_trim=True, fast=False)
    backend.trim(8192, 4096, fua=False)


def test_a_filter_shows_the_disk_beneath(file: Watched) -> None:
    through = Filter(file)
    assert (through.size, through.capabilities) == (file.size, file.capabilities)
    assert through.contexts == file.contexts
    buffer = bytearray(512)
    through.read_into(1000, memoryview(buffer))
    assert bytes(buffer) == file.path.read_bytes()[1000:1512]
    for context in (BASE_ALLOCATION, ALLOCATION_DEPTH):
        assert list(through.extents(0, 2 * MIB, context)) == list(file.extents(0, 2 * MIB, context))
    assert through.file_range(5) == file.file_range(5)
    assert through.write_range(5) == file.write_range(5) is not None
    change_everything(through)
    through.cache(0, 4096)
    through.log_writes()
    through.flush()
    assert [name for name, *_ in file.asked] == ["write", "zero", "trim", "log_writes", "flush"]


def test_write_through_makes_everything_durable(file: Watched) -> None:
    change_everything(WriteThrough(file))
    changes = [asked for asked in file.asked if asked[0] != "flush"]
    assert changes == [("write", 512, True), ("zero", 4096, True, True), ("trim", 4096, True)]


def test_write_through_waits_for_the_disk_with_the_workers(file: Watched) -> None:
    filtered = WriteThrough(file)
    assert not filtered.write_now(0, b"x" * 512)
    assert not filtered.is_local(Command.WRITE, 0, 512)
    assert not file.asked
    assert filtered.read_now(0, memoryview(bytearray(512)))
    assert filtered.is_local(Command.READ, 0, 512)


def test_nothing_is_written_past_a_filter_that_has_to_see_it(file: Watched) -> None:
    assert WriteThrough(file).write_range(0) is None
    assert ZeroDetector(file, may_trim=False).write_range(0) is None


def test_unsafe_makes_nothing_durable(file: Watched) -> None:
    filtered = Unsafe(file)
    filtered.write(0, b"x" * 512, fua=True)
    filtered.zero(4096, 4096, fua=True, may_trim=True, fast=False)
    filtered.trim(8192, 4096, fua=True)
    filtered.flush()
    assert file.asked == [("write", 512, False), ("zero", 4096, False, True), ("trim", 4096, False)]
    assert filtered.is_local(Command.FLUSH, 0, 0)


def test_keep_space_zeroes_without_holes_and_trims_nothing(file: Watched) -> None:
    filtered = KeepSpace(file)
    before = file.path.read_bytes()
    filtered.trim(0, 64 * KIB, fua=True)
    assert file.path.read_bytes() == before
    filtered.zero(0, 64 * KIB, fua=False, may_trim=True, fast=False)
    assert file.asked == [("flush",), ("zero", 64 * KIB, False, False)]


NEARLY = [
    (b"\0" * MIB, True),
    (b"\0", True),
    (b"\0" * 100, True),
    (b"\0" * (MIB + MIB // 2), True),
    (b"\0" * (MIB - 1) + b"\1", False),
    (b"\1" + b"\0" * 4095, False),
    (b"\0" * 63 + b"\1", False),
    (b"\0" * 64 + b"\1", False),
    (b"\0" * (MIB + 5) + b"\x80", False),
    (b"\0" * 2048 + b"\1" + b"\0" * 2047, False),
]


@pytest.mark.parametrize(("data", "zeroes"), NEARLY)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_only_writes_of_nothing_but_zeroes_are_taken_for_zeroing(
    file: Watched, data: bytes, zeroes: bool, kind: type[bytes]
) -> None:
    filtered = ZeroDetector(file, may_trim=True)
    filtered.write(512, kind(data), fua=True)
    assert file.asked[0] == (("zero", len(data), True, True) if zeroes else ("write", len(data), True))
    assert file.path.read_bytes()[512 : 512 + len(data)] == data


@pytest.mark.parametrize(("data", "zeroes"), NEARLY)
def test_at_once_are_written_only_data_that_are_not_all_zeroes(
    file: Watched, data: bytes, zeroes: bool
) -> None:
    before = file.path.read_bytes()
    assert ZeroDetector(file, may_trim=True).write_now(512, data) is not zeroes
    assert not [asked for asked in file.asked if asked[0] == "zero"]
    wanted = before if zeroes else before[:512] + data + before[512 + len(data) :]
    assert file.path.read_bytes() == wanted


def test_the_kinds_of_caching_are_qemus() -> None:
    assert {mode.value: (mode.direct, mode.durable) for mode in Caching} == {
        "none": (True, False),
        "writeback": (False, False),
        "writethrough": (False, True),
        "directsync": (True, True),
        "unsafe": (False, False),
    }
