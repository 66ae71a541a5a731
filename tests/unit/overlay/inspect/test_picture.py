"""What a picture of a disk shows: nothing is too small, and sizes are exact."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image as Canvas

from overlay.formats.image import Image
from overlay.formats.open import open_image
from overlay.inspect.drawing import save_png
from overlay.inspect.picture import Kind, colour_of, survey
from tests.support.disks import KIB, MIB, random_bytes
from tests.support.overlays import Layout, make_overlay

GIB, TIB = 1024 * MIB, 1024 * 1024 * MIB
GRAIN = 4 * KIB


def image_of(path: Path, size: int, layout: Layout = "flat") -> Image:
    """An empty overlay, open for writing."""
    return open_image(make_overlay(path, layout, size, "nbd://localhost"), writable=True)


def test_each_kind_is_counted_to_the_byte_and_lies_in_its_block(tmp_path: Path) -> None:
    with image_of(tmp_path / "disk", 16 * MIB) as image:
        image.fill(MIB, random_bytes(MIB))
        image.fill_zero(4 * MIB, 2 * MIB)
        image.write(8 * MIB, random_bytes(GRAIN))
        seen = survey(image, 16)
    assert seen.block == MIB
    assert seen.totals == {
        Kind.COPIED: MIB,
        Kind.WRITTEN: GRAIN,
        Kind.ZERO: 2 * MIB,
        Kind.ABSENT: 13 * MIB - GRAIN,
    }
    assert seen.shares[1] == (MIB, 0, 0, 0)
    assert seen.shares[4] == seen.shares[5] == (0, 0, MIB, 0)
    assert seen.shares[8] == (0, GRAIN, 0, MIB - GRAIN)
    assert seen.shares[0] == seen.shares[15] == (0, 0, 0, MIB)


@pytest.mark.parametrize("size", [4 * KIB, MIB, MIB + 512, GIB, 15 * TIB])
def test_the_blocks_cover_the_disk_whatever_its_size(size: int, tmp_path: Path) -> None:
    with image_of(tmp_path / "disk", size) as image:
        seen = survey(image, 9216)
    assert sum(map(sum, seen.shares)) == size
    assert len(seen.shares) <= 9216
    assert len(seen.shares) > 4096 or seen.block == GRAIN


def test_one_grain_in_a_terabyte_leaves_a_trace(tmp_path: Path) -> None:
    with image_of(tmp_path / "disk", 15 * TIB) as image:
        image.write(7 * TIB, random_bytes(GRAIN))
        seen = survey(image, 9216)
    traces = [share for share in seen.shares if share[1]]
    assert len(traces) == 1
    difference = [abs(a - b) for a, b in zip(colour_of(traces[0]), Kind.ABSENT.colour, strict=True)]
    assert max(difference) > 50


def test_a_block_of_one_kind_has_exactly_its_colour() -> None:
    assert colour_of((0, 0, 0, 4096)) == Kind.ABSENT.colour
    assert colour_of((0, 512, 0, 0)) == Kind.WRITTEN.colour


def test_a_qed_image_is_not_said_to_know_who_wrote_what(tmp_path: Path) -> None:
    with image_of(tmp_path / "disk", MIB, "qed") as image:
        image.write(0, random_bytes(64 * KIB))
        image.commit()
        seen = survey(image, 16)
    assert Kind.WRITTEN not in seen.labels
    assert seen.labels[Kind.COPIED] == "copied or written"
    assert seen.totals[Kind.COPIED] == 64 * KIB


def test_a_png_has_the_colours_of_what_is_on_the_disk(tmp_path: Path) -> None:
    with image_of(tmp_path / "disk", MIB) as image:
        image.fill(0, random_bytes(256 * KIB))
        image.fill_zero(256 * KIB, 256 * KIB)
        save_png(image, tmp_path / "disk.png", "a disk")
        with Canvas.open(tmp_path / "disk.png") as picture:
            counted = {colour: count for count, colour in picture.convert("RGB").getcolors(1 << 24) or []}
    assert counted[Kind.COPIED.colour] > 50_000
    assert counted[Kind.ZERO.colour] > 50_000
    assert counted[Kind.ABSENT.colour] > 100_000
    assert counted.get(Kind.WRITTEN.colour, 0) < 1000, "only in the legend"
