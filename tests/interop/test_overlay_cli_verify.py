"""``nbd-overlay verify`` and the pictures of ``nbd-overlay map``, on images that a daemon has filled."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image as Canvas

from tests.support.disks import KIB, MIB, random_bytes, sparse_disk, sparse_runs
from tests.support.overlays import Layout, make_overlay, overlay
from tests.support.processes import check, run
from tests.support.servers import Server, nbdserve

PROGRAM = Path(sys.executable).with_name("nbd-overlay")
SIZE = 16 * MIB
WRITTEN = 9 * MIB


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Server]:
    """A server with a disk of data and holes."""
    sparse_disk(tmp_path / "base.img", sparse_runs(SIZE, 256 * KIB))
    with nbdserve("-r", "-fraw", tmp_path / "base.img", directory=tmp_path) as server:
        yield server


def half_filled(source: Server, directory: Path, layout: Layout = "flat") -> Path:
    """An image of which a guest has read the first half, and to which it wrote 64 KiB elsewhere."""
    image = make_overlay(directory / f"disk.{layout}", layout, SIZE, source.uri())
    with overlay(image, directory=directory) as daemon, daemon.guest() as guest:
        guest.read(0, SIZE // 2)
        guest.write(WRITTEN, random_bytes(64 * KIB, 7))
        guest.write(MIB, random_bytes(4 * KIB, 8))
    return image


def test_what_was_copied_is_the_same_whatever_the_guest_wrote(source: Server, tmp_path: Path) -> None:
    image = half_filled(source, tmp_path)
    found = json.loads(check(PROGRAM, "verify", "--json", image))
    assert found["differing"] == 0
    assert found["written"] == 68 * KIB
    assert found["compared"] >= SIZE // 2 - 4 * KIB
    assert found["compared"] + found["written"] + found["absent"] == SIZE
    assert "no difference" in check(PROGRAM, "verify", image)


def test_each_grain_that_differs_is_found_and_the_first_are_named(source: Server, tmp_path: Path) -> None:
    image = half_filled(source, tmp_path)
    places = [0, 3 * MIB + 4 * KIB, *range(5 * MIB, 5 * MIB + 20 * 4 * KIB, 4 * KIB)]
    with image.open("r+b") as file:
        for place in places:
            file.seek(place + 17)
            old = file.read(1)
            file.seek(place + 17)
            file.write(bytes([old[0] ^ 1]))
    done = run(PROGRAM, "verify", image)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert "the 4 KiB at 0 (0x0) are not those of" in lines[0]
    assert f"at {3 * MIB + 4 * KIB} " in lines[1]
    assert lines[-2].endswith(f"and {len(places) - 16} more")
    assert lines[-1].startswith(f"{len(places)} x 4 KiB differ")
    found = json.loads(run(PROGRAM, "verify", "--json", image).stdout)
    assert (found["differing"], found["offsets"]) == (len(places), places[:16])


def test_a_source_that_has_changed_is_told_from_the_copy(source: Server, tmp_path: Path) -> None:
    image = half_filled(source, tmp_path)
    with (tmp_path / "base.img").open("r+b") as file:
        for place in (MIB, WRITTEN):  # what the guest wrote is not compared
            file.seek(place)
            file.write(b"\xff")
        file.seek(2 * MIB)
        file.write(random_bytes(4 * KIB, 9))
    found = json.loads(run(PROGRAM, "verify", "--json", image).stdout)
    assert found["offsets"] == [2 * MIB]


def test_where_nothing_can_be_compared_it_says_why_in_a_line(source: Server, tmp_path: Path) -> None:
    flat, qed = half_filled(source, tmp_path), half_filled(source, tmp_path, "qed")
    raw = tmp_path / "base.img"
    with overlay(flat, directory=tmp_path):
        cases = {flat: "in use", qed: "a QED image does not say", raw: "it needs no backing any more"}
        for path, wanted in {**cases, tmp_path / "none": "no such file"}.items():
            done = run(PROGRAM, "verify", path)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert wanted in done.stderr, done.stderr
    source.process.terminate()
    done = run(PROGRAM, "verify", flat)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr


@pytest.mark.parametrize("layout", ["flat", "qed"])
def test_a_picture_is_drawn_into_a_file_and_into_a_terminal(
    layout: Layout, source: Server, tmp_path: Path
) -> None:
    image = half_filled(source, tmp_path, layout)
    png = tmp_path / "disk.png"
    assert check(PROGRAM, "map", "--png", png, image) == ""
    with Canvas.open(png) as picture:
        assert picture.format == "PNG"
        assert picture.width > 800
    drawn = check(PROGRAM, "map", "--color", "always", image)
    assert "▀" in drawn
    assert "\x1b[" in drawn
    assert ("written by the guest 68 KiB" in drawn) is (layout == "flat")
    assert ("copied or written" in drawn) is (layout == "qed")
    assert "file offset" in check(PROGRAM, "map", image), "without a terminal a table"


def test_a_picture_never_takes_the_place_of_a_disk(source: Server, tmp_path: Path) -> None:
    image = half_filled(source, tmp_path)
    for target in (image, Path(f"{image}.map")):
        before = target.read_bytes()
        done = run(PROGRAM, "map", "--png", target, image)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert target.read_bytes() == before
    done = run(PROGRAM, "map", "--png", tmp_path / "none" / "x.png", image)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr


def test_a_backing_that_has_no_whole_sectors_is_compared_to_its_last_byte(tmp_path: Path) -> None:
    size = SIZE + 100
    with (tmp_path / "base.img").open("wb") as file:
        file.write(random_bytes(MIB, 3))
        file.seek(SIZE)
        file.write(random_bytes(100, 4))
    with nbdserve("-r", "-fraw", tmp_path / "base.img", directory=tmp_path) as server:
        image = make_overlay(tmp_path / "disk.flat", "flat", SIZE + 512, server.uri())
        with overlay(image, directory=tmp_path) as daemon, daemon.guest() as guest:
            guest.read(0, 2 * MIB)
            guest.read(SIZE, 512)
        found = json.loads(check(PROGRAM, "verify", "--json", image))
        assert (found["differing"], found["written"]) == (0, 0)
        with image.open("r+b") as file:
            file.seek(size - 1)
            last = file.read(1)
            file.seek(size - 1)
            file.write(bytes([last[0] ^ 1]))
        done = run(PROGRAM, "verify", image)
    assert done.returncode == 1
    assert str(SIZE) in done.stdout + done.stderr


def test_the_backing_is_where_the_operator_says_it_is_now(source: Server, tmp_path: Path) -> None:
    image = half_filled(source, tmp_path)
    source.process.terminate()
    source.process.wait()
    gone, there = f"--backing={source.uri()}", tmp_path / "elsewhere"
    there.mkdir()
    with nbdserve("-r", "-fraw", tmp_path / "base.img", directory=there) as server:
        found = json.loads(check(PROGRAM, "verify", "--json", gone, f"--backing={server.uri()}", image))
        assert (found["differing"], found["backing"]) == (0, server.uri())
        for wrong in ([gone, gone], ["--backing=ftp://there"]):
            done = run(PROGRAM, "verify", *wrong, image)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    with (tmp_path / "base.img").open("r+b") as file:
        file.truncate(SIZE + 512)
    with nbdserve("-r", "-fraw", tmp_path / "base.img", directory=there) as server:
        done = run(PROGRAM, "verify", f"--backing={server.uri()}", image)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "another disk" in done.stderr
