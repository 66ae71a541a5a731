"""The demo's disk: what was not written must be as it was, read by qemu-nbd and nbdcopy."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.common.errors import OperatorError
from recipes.demo.disk import HOLE, Original, compare
from recipes.demo.records import cells_on, extents
from tests.support.processes import check

MIB = 1 << 20
SIZE = 32 * MIB


@pytest.fixture
def original() -> Original:
    return Original(SIZE)


@pytest.fixture
def raw(original: Original, tmp_path: Path) -> Path:
    image = tmp_path / "disk.raw"
    original.write(image)
    return image


def change(image: Path, offset: int) -> None:
    """Flip a byte of a raw image."""
    with image.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1]))


def test_the_disk_is_random_with_holes_and_no_two_are_alike(original: Original, raw: Path) -> None:
    content = raw.read_bytes()
    chunks = [content[at : at + MIB] for at in range(0, SIZE, MIB)]
    assert len(set(chunks)) == len(chunks) - len(chunks) // 16 + 1
    assert chunks[HOLE] == bytes(MIB)
    assert raw.stat().st_blocks * 512 < SIZE
    assert Original(SIZE).chunk(0) != original.chunk(0)


@pytest.mark.parametrize("layout", ["raw", "qed", "qcow2"])
def test_a_copy_equals_the_original(original: Original, raw: Path, tmp_path: Path, layout: str) -> None:
    copy = tmp_path / "copy"
    check("qemu-img", "convert", "-f", "raw", "-O", layout, raw, copy)
    result = compare(original, copy, layout, [])
    assert result.equal
    assert (result.compared, result.excepted) == (SIZE, 0)


def test_a_changed_byte_is_found_and_located(original: Original, raw: Path) -> None:
    change(raw, 5 * MIB + 4095)
    change(raw, 5 * MIB + 4096)
    change(raw, HOLE * MIB + 1)
    result = compare(original, raw, "raw", [])
    assert not result.equal
    assert (result.different, result.first) == (3, 5 * MIB + 4095)


def test_what_the_guest_wrote_is_excepted_to_the_byte(original: Original, raw: Path) -> None:
    written = list(extents(100, cells_on(SIZE)))
    for offset, length in written:
        change(raw, offset)
        change(raw, offset + length - 1)
    result = compare(original, raw, "raw", written)
    assert result.equal
    assert result.excepted == sum(length for _, length in written)
    assert result.compared + result.excepted == SIZE
    first, length = written[50]
    change(raw, first - 1)
    change(raw, first + length)
    assert compare(original, raw, "raw", written).first == first - 1


def test_a_copy_of_another_size_is_refused(original: Original, raw: Path) -> None:
    for size in (SIZE - 512, SIZE + 512):
        check("truncate", "-s", str(size), raw)
        with pytest.raises(OperatorError, match=f"has {size} bytes, the original had {SIZE}"):
            compare(original, raw, "raw", [])


def test_a_copy_that_cannot_be_read_is_one_clear_line(original: Original, tmp_path: Path) -> None:
    broken = tmp_path / "broken.qed"
    check(
        "qemu-img", "create", "-q", "-f", "qed", "-u", "-F", "raw", "-b", tmp_path / "gone", broken, str(SIZE)
    )
    with pytest.raises(OperatorError, match=r"cannot read it.*gone.*No such file") as error:
        compare(original, broken, "qed", [])
    assert "\n" not in str(error.value)
