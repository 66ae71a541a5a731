"""The raw file backend, on real files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdserve.backends.file import DATA, HOLE, FileBackend
from nbdserve.backends.offset import Slice
from nbdserve.common.errors import ImageError, UsageError
from nbdserve.protocol.extents import Extent, coalesce
from tests.support.disks import KIB, random_disk

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of an odd size with data in its second MiB only."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(3 * MIB + 7)
        file.seek(MIB)
        file.write(os.urandom(MIB))
    return path


def read(backend: FileBackend, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    backend.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_the_size_is_exact_to_the_byte(image: Path) -> None:
    assert FileBackend(image, read_only=True).size == 3 * MIB + 7


def test_reads_return_what_the_file_holds(image: Path) -> None:
    backend = FileBackend(image, read_only=True)
    whole = image.read_bytes()
    for offset, length in ((0, 1), (MIB - 1, 2), (3 * MIB + 6, 1), (0, len(whole))):
        assert read(backend, offset, length) == whole[offset : offset + length]


def test_a_file_that_shrank_is_an_error_and_never_zeroes(image: Path) -> None:
    backend = FileBackend(image, read_only=True)
    os.truncate(image, MIB)
    with pytest.raises(OSError, match="ends before") as caught:
        read(backend, MIB - 4096, 8192)
    assert caught.value.errno == errno.EIO


def test_extents_tell_data_from_holes(image: Path) -> None:
    backend = FileBackend(image, read_only=True)
    found = list(coalesce(backend.extents(0, backend.size, "base:allocation")))
    assert found == [Extent(MIB, HOLE), Extent(MIB, DATA), Extent(MIB + 7, HOLE)]
    assert list(backend.extents(MIB + 5, 10, "base:allocation")) == [Extent(10, DATA)]


@pytest.mark.parametrize("may_trim", [True, False])
@pytest.mark.parametrize(("offset", "length"), [(MIB, MIB), (MIB + 3, 4099), (3 * MIB, 7), (0, 3 * MIB + 7)])
def test_zeroed_ranges_read_as_zeroes_and_nothing_else_changes(
    image: Path, may_trim: bool, offset: int, length: int
) -> None:
    expected = bytearray(image.read_bytes())
    expected[offset : offset + length] = bytes(length)
    backend = FileBackend(image, read_only=False)
    backend.zero(offset, length, fua=True, may_trim=may_trim, fast=False)
    assert image.read_bytes() == expected


def test_a_trim_gives_space_back_unless_discard_is_off(image: Path) -> None:
    before = image.stat().st_blocks
    FileBackend(image, read_only=False, discard=False).trim(MIB, MIB, fua=False)
    assert image.stat().st_blocks == before
    FileBackend(image, read_only=False).trim(MIB, MIB, fua=True)
    assert image.stat().st_blocks < before


@pytest.mark.parametrize("make_hole", ["trim", "zero"])
def test_a_hole_that_was_made_here_is_told_at_once(tmp_path: Path, make_hole: str) -> None:
    random_disk(tmp_path / "disk", 256 * KIB)
    backend = FileBackend(tmp_path / "disk", read_only=False)
    context = "base:allocation"
    assert list(backend.extents(0, backend.size, context)) == [Extent(256 * KIB, DATA)]
    if make_hole == "trim":
        backend.trim(64 * KIB, 64 * KIB, fua=False)
    else:
        backend.zero(64 * KIB, 64 * KIB, fua=False, may_trim=True, fast=False)
    assert list(backend.extents(64 * KIB, 64 * KIB, context)) == [Extent(64 * KIB, HOLE)]
    assert list(backend.extents(128 * KIB, 4 * KIB, context)) == [Extent(4 * KIB, DATA)]
    backend.close()


def test_a_slice_is_served_as_if_it_were_the_whole(image: Path) -> None:
    whole = image.read_bytes()
    backend = FileBackend(image, read_only=False, part=Slice(MIB + 5, 4096))
    assert backend.size == 4096
    assert read(backend, 10, 20) == whole[MIB + 15 : MIB + 35]
    backend.write(0, b"x" * 4096, fua=True)
    assert image.read_bytes() == whole[: MIB + 5] + b"x" * 4096 + whole[MIB + 5 + 4096 :]


@pytest.mark.parametrize("part", [Slice(4 * MIB), Slice(0, 4 * MIB), Slice(3 * MIB, 8)])
def test_a_slice_that_does_not_fit_is_refused(image: Path, part: Slice) -> None:
    with pytest.raises(UsageError, match=r"disk\.img"):
        FileBackend(image, read_only=True, part=part)


def test_what_is_no_disk_is_refused() -> None:
    with pytest.raises(ImageError, match="not a regular file"):
        FileBackend(Path("/dev/null"), read_only=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "zero", "hole"]), st.integers(0, 40_000), st.integers(1, 10_000)),
        max_size=15,
    )
)
def test_any_history_leaves_the_file_as_a_byte_array_would_be(
    tmp_path: Path, history: list[tuple[str, int, int]]
) -> None:
    path = tmp_path / "history.img"
    path.write_bytes(bytes(50_000))
    model = bytearray(50_000)
    backend = FileBackend(path, read_only=False)
    for number, (action, offset, length) in enumerate(history, start=1):
        if action == "write":
            data = bytes([number]) * length
            backend.write(offset, data, fua=number % 2 == 0)
            model[offset : offset + length] = data
        else:
            backend.zero(offset, length, fua=False, may_trim=action == "hole", fast=False)
            model[offset : offset + length] = bytes(length)
    assert read(backend, 0, 50_000) == model
    assert path.read_bytes() == model
    backend.close()


def test_reading_and_writing_at_once_are_exact_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    random_disk(path, 10_001)
    backend = FileBackend(path, read_only=False, part=Slice(1, 9_000))
    wanted = bytearray(path.read_bytes())
    assert backend.write_now(4_000, memoryview(b"x" * 1_000))
    wanted[4_001:5_001] = b"x" * 1_000
    buffer = bytearray(9_000)
    assert backend.read_now(0, memoryview(buffer))
    backend.close()
    assert buffer == wanted[1:9_001]
    assert path.read_bytes() == wanted


def test_reading_at_once_past_the_end_of_a_file_that_has_shrunk_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    random_disk(path, 64 * KIB)
    backend = FileBackend(path, read_only=True)
    os.truncate(path, 6_000)
    with pytest.raises(OSError, match="ends before") as caught:
        backend.read_now(4096, memoryview(bytearray(4096)))
    assert caught.value.errno == errno.EIO
    backend.close()
