"""An open QED image against a plain array of bytes, on real files."""

from __future__ import annotations

import errno
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdserve.common.errors import ImageError
from overlay.formats.image import Run, State
from overlay.formats.qed import tables
from overlay.formats.qed.check import Report, check
from overlay.formats.qed.header import Feature, read_header
from overlay.formats.qed.image import QedImage
from overlay.formats.storage import FileStorage, open_file
from tests.support.qed import make_image, poke, read_u64

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
CLUSTER = 64 * KIB


def report_on(path: Path) -> Report:
    storage = open_file(path)
    try:
        return check(storage, read_header(storage, str(path))[0])
    finally:
        storage.close()


def assert_clean(path: Path) -> None:
    report = report_on(path)
    assert (report.corruptions, report.leaks, report.problems) == (0, 0, [])


def states(image: QedImage) -> list[tuple[int, int, State]]:
    return [(run.offset, run.length, run.state) for run in image.runs(0, image.size)]


def test_a_new_image_is_absent_from_end_to_end(tmp_path: Path) -> None:
    make_image(tmp_path / "a", TIB, backing="nbd://h/")
    with QedImage.open(tmp_path / "a") as image:
        assert image.size == TIB
        assert list(image.runs(0, TIB)) == [Run(0, TIB, State.ABSENT)]
        assert list(image.runs(5, 7)) == [Run(5, 7, State.ABSENT)]
        assert list(image.runs(5, 0)) == []
    assert (tmp_path / "a").stat().st_blocks * 512 < 64 * KIB


def test_reading_what_only_the_backing_has_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    make_image(tmp_path / "a", MIB, backing="nbd://h/")
    with QedImage.open(tmp_path / "a", writable=True) as image:
        image.write(0, b"x" * CLUSTER)
        assert image.read(0, CLUSTER) == b"x" * CLUSTER
        for offset, length in ((CLUSTER, 1), (CLUSTER - 1, 2)):
            with pytest.raises(OSError) as caught:
                image.read(offset, length)
            assert caught.value.errno == errno.ENODATA


def test_part_of_a_cluster_in_the_backing_is_not_written_and_nothing_changes(tmp_path: Path) -> None:
    make_image(tmp_path / "a", MIB + 512, backing="nbd://h/")
    with QedImage.open(tmp_path / "a", writable=True) as image:
        attempts: list[Callable[[], bool]] = [
            lambda: image.write(0, b"x"),
            lambda: image.write(1, b"x" * (CLUSTER - 1)),
            lambda: image.write(0, b"x" * (CLUSTER + 1)),
            lambda: image.write(MIB + 1, b"x" * 511),
            lambda: image.zero(0, 512),
            lambda: image.zero(CLUSTER - 1, CLUSTER + 1),
        ]
        for attempt in attempts:
            assert not attempt()
        assert states(image) == [(0, image.size, State.ABSENT)]
        assert image.write(MIB, b"y" * 512)
        assert image.read(MIB, 512) == b"y" * 512
    assert_clean(tmp_path / "a")


def test_zeroing_whole_absent_clusters_stores_nothing(tmp_path: Path) -> None:
    make_image(tmp_path / "a", TIB, backing="nbd://h/")
    with QedImage.open(tmp_path / "a", writable=True) as image:
        image.zero(CLUSTER, 3 * GIB)
        assert states(image) == [
            (0, CLUSTER, State.ABSENT),
            (CLUSTER, 3 * GIB, State.ZERO),
            (CLUSTER + 3 * GIB, TIB - 3 * GIB - CLUSTER, State.ABSENT),
        ]
        assert image.read(GIB, 100) == bytes(100)
        image.write(GIB + 5, b"data")
        assert image.read(GIB, 12) == bytes(5) + b"data" + bytes(3)
    assert_clean(tmp_path / "a")
    assert (tmp_path / "a").stat().st_blocks * 512 < MIB


def test_an_image_open_for_reading_refuses_changes_and_ranges_outside(tmp_path: Path) -> None:
    make_image(tmp_path / "a", MIB)
    with QedImage.open(tmp_path / "a") as image:
        with pytest.raises(OSError) as caught:
            image.write(0, b"x")
        assert caught.value.errno == errno.EROFS
        for offset, length in ((-1, 1), (MIB, 1), (0, MIB + 1), (3, -1)):
            with pytest.raises(OSError) as caught:
                image.read(offset, length)
            assert caught.value.errno == errno.EINVAL


writes = st.tuples(
    st.sampled_from(["write", "zero", "commit", "flush", "reopen"]),
    st.integers(0, 1198),
    st.integers(1, 300),
    st.integers(1, 255),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(writes, max_size=40), st.sampled_from([(4096, 2), (4096, 4), (16384, 2)]), st.booleans())
def test_any_history_of_writes_reads_like_an_array_of_bytes(
    tmp_path: Path, history: list[tuple[str, int, int, int]], geometry: tuple[int, int], small_slices: bool
) -> None:
    """Offsets and lengths are in units of 1000 bytes, so that they fall on no border."""
    path = tmp_path / "a"
    path.unlink(missing_ok=True)
    size = 4 * MIB + 512 * 3
    make_image(path, size, cluster_size=geometry[0], table_size=geometry[1])
    model = bytearray(size)
    with pytest.MonkeyPatch.context() as patch:
        if small_slices:  # everything falls out of the caches all the time
            patch.setattr(tables, "SLICE_ENTRIES", 16)
            patch.setattr(tables, "CACHED_SLICES", 2)
            patch.setattr(tables, "DIRTY_SLICES", 3)
        image = QedImage.open(path, writable=True)
        for action, start, length, value in history:
            offset = start * 3501
            length = min(length * 1000, size - offset)
            if action == "write":
                data = bytes([value]) * length
                image.write(offset, data)
                model[offset : offset + length] = data
            elif action == "zero":
                image.zero(offset, length)
                model[offset : offset + length] = bytes(length)
            elif action == "reopen":
                image.close()
                image = QedImage.open(path, writable=True)
            else:
                getattr(image, action)()
        assert image.read(0, size) == model
        image.close()
        with QedImage.open(path) as image:
            assert image.read(0, size) == model
            assert sum(run.length for run in image.runs(0, size)) == size
    assert_clean(path)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1 << 32))
def test_with_a_backing_exactly_the_clusters_that_were_written_are_present(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = tmp_path / "a"
    path.unlink(missing_ok=True)
    clusters = 1500
    make_image(path, clusters * 4096 - 512, backing="nbd://h/", cluster_size=4096, table_size=2)
    present: dict[int, State] = {}
    with QedImage.open(path, writable=True) as image:
        for _ in range(40):
            first = chance.randrange(clusters)
            count = min(chance.randint(1, 50), clusters - first)
            begin = first * 4096
            length = min(count * 4096, image.size - begin)
            if chance.random() < 0.5:
                image.write(begin, chance.randbytes(length))
                present |= dict.fromkeys(range(first, first + count), State.DATA)
            else:
                image.zero(begin, length)
                for cluster in range(first, first + count):
                    present.setdefault(cluster, State.ZERO)
    with QedImage.open(path) as image:
        for run in image.runs(0, image.size):
            for cluster in range(run.offset // 4096, -(-(run.offset + run.length) // 4096)):
                assert run.state is present.get(cluster, State.ABSENT)
    assert_clean(path)


def test_neighbouring_runs_differ_in_state_or_place(tmp_path: Path) -> None:
    make_image(tmp_path / "a", 9 * GIB)
    with QedImage.open(tmp_path / "a", writable=True) as image:
        for offset in (
            0,
            CLUSTER,
            5 * CLUSTER,
            2 * GIB - CLUSTER,
            2 * GIB,
            2 * GIB + 2 * CLUSTER,
            2 * GIB + CLUSTER,
        ):
            image.write(offset, b"x" * CLUSTER)
        runs = list(image.runs(0, image.size))
    for before, after in itertools.pairwise(runs):
        assert before.offset + before.length == after.offset
        contiguous = before.file_offset is None or before.file_offset + before.length == after.file_offset
        assert before.state is not after.state or not contiguous


def test_a_failed_write_leaves_no_leak_and_keeps_the_image_usable(tmp_path: Path) -> None:
    make_image(tmp_path / "a", MIB)

    class Full(FileStorage):
        full = False

        def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(offset, data)

    storage = Full(os.open(tmp_path / "a", os.O_RDWR), tmp_path / "a")
    with QedImage(storage, "a", writable=True) as image:
        image.write(0, b"a" * 100)
        storage.full = True
        with pytest.raises(OSError):
            image.write(CLUSTER, b"b" * 100)
        with pytest.raises(OSError):
            image.commit()
        storage.full = False
        image.write(2 * CLUSTER, b"c" * 100)
        assert image.read(CLUSTER, 100) == bytes(100)
    assert_clean(tmp_path / "a")
    with QedImage.open(tmp_path / "a") as image:
        assert image.read(0, 100) == b"a" * 100
        assert image.read(2 * CLUSTER, 100) == b"c" * 100


def test_after_a_failed_sync_nothing_more_is_taken_nor_claimed_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(tmp_path / "a", MIB)
    image = QedImage.open(tmp_path / "a", writable=True)
    image.write(0, b"a" * 100)
    before = (tmp_path / "a").read_bytes()[: 5 * CLUSTER]

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        with pytest.raises(OSError):
            image.flush()
    for attempt in (
        image.commit,
        image.flush,
        lambda: image.write(0, b"b"),
        lambda: image.write(MIB // 2, b"b"),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EIO
    with pytest.raises(OSError):
        image.close()
    assert (tmp_path / "a").read_bytes()[: 5 * CLUSTER] == before, "the tables tell of data that may be lost"


def test_the_memory_for_tables_stays_small_on_a_disk_of_16_tib(tmp_path: Path) -> None:
    make_image(tmp_path / "a", 16 * TIB)
    with QedImage.open(tmp_path / "a", writable=True) as image:
        for number in range(0, 16 * 1024, 16):
            image.write(number * GIB, b"x")
        assert len(image._tables._slices) <= tables.CACHED_SLICES
        assert len(image._tables._dirty) <= tables.DIRTY_SLICES
        assert image.read(16 * 1000 * GIB, 2) == b"x\0"


def test_opening_for_writing_clears_autoclear_bits_and_reading_does_not(tmp_path: Path) -> None:
    path = tmp_path / "a"
    make_image(path, MIB)
    poke(path, 32, 0x8000000000000001)
    poke(path, 24, 5)
    QedImage.open(path).close()
    assert read_u64(path, 32) == 0x8000000000000001
    QedImage.open(path, writable=True).close()
    assert read_u64(path, 32) == 0
    assert read_u64(path, 24) == 5, "compatible features are kept"


def dirty_image(path: Path) -> int:
    """An image with a cluster, marked as not closed cleanly; returns where its L2 table is."""
    make_image(path, MIB)
    with QedImage.open(path, writable=True) as image:
        image.write(0, b"x" * CLUSTER)
    poke(path, 16, Feature.NEED_CHECK)
    return read_u64(path, CLUSTER)


def test_an_image_not_closed_cleanly_is_checked_before_it_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "a"
    dirty_image(path)
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + CLUSTER)
    assert report_on(path).leaks == 1
    with QedImage.open(path) as image:
        assert image.read(0, 5) == b"xxxxx"
    assert read_u64(path, 16) == Feature.NEED_CHECK, "reading changes nothing"
    with QedImage.open(path, writable=True) as image:
        assert image.read(0, 5) == b"xxxxx"
        assert read_u64(path, 16) == 0


def test_an_image_not_closed_cleanly_with_errors_is_not_opened_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    l2 = dirty_image(path)
    poke(path, l2 + 8, 1 << 40)
    content = path.read_bytes()
    with pytest.raises(ImageError, match=r"not closed cleanly and has 1 errors; see nbd-overlay check"):
        QedImage.open(path, writable=True)
    assert path.read_bytes() == content


def test_bytes_behind_the_last_whole_cluster_never_become_data(tmp_path: Path) -> None:
    path = tmp_path / "a"
    make_image(path, MIB)
    with path.open("ab") as file:
        file.write(b"garbage" * 1000)
    with QedImage.open(path, writable=True) as image:
        image.write(5, b"x")
        assert image.read(0, CLUSTER) == b"\0\0\0\0\0x" + bytes(CLUSTER - 6)
    assert_clean(path)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        (2, "not the place of a cluster"),
        (CLUSTER + 512, "not the place of a cluster"),
        (1 << 63, "not the place of a cluster"),
        (2**64 - CLUSTER, "not the place of a cluster"),
        (100 * CLUSTER, "not the place of a cluster"),
        (CLUSTER, "lies on the table at 0x10000"),
        (3 * CLUSTER, "lies on the table at 0x10000"),
        (7 * CLUSTER, "lies on the table at 0x60000"),
    ],
)
def test_a_damaged_entry_is_an_error_for_readers_and_writers(
    tmp_path: Path, entry: int, complaint: str
) -> None:
    path = tmp_path / "a"
    l2 = dirty_image(path)
    assert l2 == 6 * CLUSTER
    poke(path, 16, 0)
    poke(path, l2 + 8, entry)
    with QedImage.open(path, writable=True) as image:
        for attempt in (
            lambda: image.read(CLUSTER, 1),
            lambda: list(image.runs(0, MIB)),
            lambda: image.write(CLUSTER, b"x"),
            lambda: image.zero(CLUSTER, 512),
        ):
            with pytest.raises(ImageError, match=complaint) as caught:
                attempt()
            assert "nbd-overlay check" in str(caught.value)


def test_an_entry_behind_the_end_is_still_wrong_after_the_file_has_grown_past_it(tmp_path: Path) -> None:
    """Otherwise two parts of the disk would share the cluster that is allocated there."""
    path = tmp_path / "a"
    make_image(path, 10 * GIB)
    with QedImage.open(path, writable=True) as image:
        image.write(0, b"x" * CLUSTER)
        image.write(9 * GIB, b"x" * CLUSTER)
    second_l2 = read_u64(path, CLUSTER + 8 * 4)
    end = path.stat().st_size
    poke(path, second_l2, end)
    with QedImage.open(path, writable=True) as image:
        image.write(CLUSTER, b"y" * CLUSTER * 4)
        for offset in (8 * GIB, 8 * GIB + 5 * CLUSTER):
            with pytest.raises(ImageError, match="not the place of a cluster"):
                image.write(offset, b"z")
        with pytest.raises(ImageError, match="not the place of a cluster"):
            image.read(8 * GIB, 1)


@pytest.mark.parametrize(
    ("index", "entry", "complaint"),
    [
        (1, 1, "not the place of an L2 table"),
        (1, CLUSTER // 2, "not the place of an L2 table"),
        (1, 1 << 62, "not the place of an L2 table"),
        (1, 2**64 - CLUSTER, "not the place of an L2 table"),
        (1, 8 * CLUSTER, "not the place of an L2 table"),
        (1, CLUSTER, "two tables overlap"),
        (1, 2 * CLUSTER, "two tables overlap"),
        (1, 6 * CLUSTER, "two tables overlap"),
        (1, 5 * CLUSTER, "two tables overlap"),
    ],
)
def test_a_damaged_l1_table_is_refused_on_opening(
    tmp_path: Path, index: int, entry: int, complaint: str
) -> None:
    path = tmp_path / "a"
    make_image(path, 10 * GIB)
    with QedImage.open(path, writable=True) as image:
        image.write(0, b"x" * CLUSTER)
    assert read_u64(path, CLUSTER) == 6 * CLUSTER
    poke(path, CLUSTER + 8 * index, entry)
    for writable in (False, True):
        with pytest.raises(ImageError, match=complaint):
            QedImage.open(path, writable=writable)


def test_a_second_writer_is_kept_out(tmp_path: Path) -> None:
    make_image(tmp_path / "a", MIB)
    with QedImage.open(tmp_path / "a", writable=True):
        for writable in (False, True):
            with pytest.raises(ImageError, match="in use"):
                QedImage.open(tmp_path / "a", writable=writable)
        QedImage.open(tmp_path / "a", force_share=True).close()


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "dangling", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "device":
        path = Path("/dev/null")
    for writable in (False, True):
        with pytest.raises(ImageError) as caught:
            QedImage.open(path, writable=writable)
        assert str(caught.value).startswith(f"{path}: ")
