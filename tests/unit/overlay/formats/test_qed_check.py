"""The consistency check: what it counts, what it repairs, and what it leaves alone."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from overlay.formats.qed.check import PROBLEMS_SHOWN, Report, check
from overlay.formats.qed.create import create
from overlay.formats.qed.header import Feature, Header, read_header
from overlay.formats.qed.image import QedImage
from overlay.formats.storage import open_file
from tests.support.qed import make_image, poke, read_u64

CLUSTER = 65536
L1 = CLUSTER
GIB = 1 << 30


def run_check(path: Path, *, repair: bool = False) -> Report:
    storage = open_file(path, writable=repair)
    try:
        header, _ = read_header(storage, str(path))
        return check(storage, header, repair=repair)
    finally:
        storage.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data in two places, with an L2 table each: at 5, 7 (clusters) and their tables at 6, 8 + 4."""
    path = tmp_path / "x.qed"
    make_image(path, 10 * GIB, backing="nbd://h/")
    with QedImage.open(path, writable=True) as opened:
        opened.write(0, b"a" * CLUSTER)
        opened.write(3 * GIB, b"b" * 2 * CLUSTER)
    return path


def first_table(image: Path) -> int:
    return read_u64(image, L1)


def test_a_sound_image_has_neither_corruptions_nor_leaks(image: Path) -> None:
    report = run_check(image)
    assert report == Report(total_clusters=10 * GIB // CLUSTER, allocated_clusters=3)


def test_scattered_clusters_count_as_fragmented(image: Path) -> None:
    with QedImage.open(image, writable=True) as opened:
        opened.write(5 * CLUSTER, b"x" * CLUSTER)
    assert run_check(image).fragmented_clusters == 1


def test_leaks_at_the_end_are_cut_off_and_others_left(image: Path) -> None:
    end = image.stat().st_size
    poke(image, first_table(image), 0)
    with image.open("r+b") as file:
        file.truncate(end + 3 * CLUSTER)
    assert run_check(image).leaks == 4
    report = run_check(image, repair=True)
    assert (report.leaks, report.leaks_fixed, report.corruptions) == (1, 3, 0)
    assert image.stat().st_size == end
    assert run_check(image).leaks == 1


def test_repair_clears_wrong_references_and_keeps_the_rest(image: Path) -> None:
    table = first_table(image)
    for index, value in ((1, 3), (2, CLUSTER // 2), (3, 1 << 50), (4000, 0), (32767, 2**64 - 1), (5000, 1)):
        poke(image, table + 8 * index, value)
    poke(image, L1 + 8 * 2, 1)
    poke(image, L1 + 8 * 32767, 1 << 60)
    report = run_check(image)
    assert (report.corruptions, len(report.problems)) == (6, 6)
    assert "entry 2 of the L1 table, 0x1, is not the place of an L2 table" in report.problems
    assert "the entry of disk offset 65536, 0x3, is not the place of a cluster" in report.problems
    report = run_check(image, repair=True)
    assert (report.corruptions, report.corruptions_fixed) == (0, 6)
    assert all(problem.endswith(": cleared") for problem in report.problems)
    assert run_check(image).corruptions == 0
    assert read_u64(image, table + 8 * 5000) == 1
    with QedImage.open(image) as opened:
        assert opened.read(0, 10) == b"a" * 10
        assert opened.read(3 * GIB, 10) == b"b" * 10


def test_a_cluster_with_two_owners_is_not_repaired_and_the_mark_stays(image: Path) -> None:
    poke(image, 16, Feature.BACKING_FILE | Feature.BACKING_FORMAT_NO_PROBE | Feature.NEED_CHECK)
    table = first_table(image)
    poke(image, table + 8, read_u64(image, table))
    before = image.read_bytes()
    report = run_check(image, repair=True)
    assert (report.corruptions, report.corruptions_fixed, report.needs_check) == (1, 0, True)
    assert "in use already" in report.problems[0]
    assert image.read_bytes() == before


@pytest.mark.parametrize("where", ["L1 table", "own table", "other table"])
def test_data_that_lies_on_a_table_is_a_corruption(image: Path, where: str) -> None:
    table = first_table(image)
    places = {"L1 table": L1 + CLUSTER, "own table": table, "other table": read_u64(image, L1 + 8)}
    poke(image, table + 8, places[where])
    assert run_check(image).corruptions == 1


def test_an_l2_table_that_lies_on_the_l1_table_ends_no_loop(image: Path) -> None:
    poke(image, L1 + 8 * 2, L1)
    report = run_check(image)
    assert report.corruptions == 4
    assert run_check(image, repair=True).corruptions == 4


def test_repair_marks_a_sound_image_as_closed_cleanly(image: Path) -> None:
    features = Feature.BACKING_FILE | Feature.BACKING_FORMAT_NO_PROBE
    poke(image, 16, features | Feature.NEED_CHECK)
    assert run_check(image).needs_check
    assert not run_check(image, repair=True).needs_check
    assert read_u64(image, 16) == features


def test_thousands_of_problems_are_counted_and_some_are_told(image: Path) -> None:
    table = first_table(image)
    with image.open("r+b") as file:
        file.seek(table)
        file.write(b"\xff" * 8 * 32768)
    report = run_check(image)
    assert report.corruptions == 32768
    assert len(report.problems) == PROBLEMS_SHOWN


def test_checking_a_vast_sparse_file_takes_little_memory(tmp_path: Path) -> None:
    """A bitmap of the file's clusters would take 256 MiB."""
    path = tmp_path / "x.qed"
    header = make_image(path, GIB, cluster_size=4096)
    with path.open("r+b") as file:
        file.truncate((1 << 43) - 4096)
    tracemalloc.start()
    report = run_check(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.leaks == (1 << 43) // 4096 - 1 - header.header_size - header.table_size
    assert peak < 1 << 20


def test_a_header_that_claims_the_largest_tables_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.qed"
    cluster = 1 << 26
    create(path, Header(cluster, 16, 1, 0, 0, 0, cluster, 1 << 50, 0, 0), None)
    tracemalloc.start()
    with QedImage.open(path, writable=True) as opened:
        opened.write(1 << 49, b"x")
        assert opened.read((1 << 49) - 1, 3) == b"\0x\0"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert path.stat().st_blocks * 512 < 1 << 20
