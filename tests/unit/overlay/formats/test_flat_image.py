"""A flat image on real files: what it refuses to open, what it keeps, how it becomes a raw disk."""

from __future__ import annotations

import errno
import os
import random
import struct
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest

from nbdserve.backends import holes
from nbdserve.common.errors import ImageError
from overlay.formats.flat import open as flat_open
from overlay.formats.flat.check import check_flat
from overlay.formats.flat.create import create, new_header
from overlay.formats.flat.header import DIRECTORY_AT, GRAIN, read_header, read_trailer
from overlay.formats.flat.image import FlatImage
from overlay.formats.flat.log import current_boot
from overlay.formats.flat.open import open_flat
from overlay.formats.flat.raw import RawImage
from overlay.formats.image import Backing, Image, Run, State
from overlay.formats.open import open_image
from overlay.formats.qed.image import QedImage
from overlay.formats.storage import FileStorage, open_file
from tests.support.qed import make_image

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BACKING = Backing("nbd://h/disk", raw=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x"


def make(path: Path, size: int = MIB) -> None:
    create(path, new_header(size, (BACKING,)))


def flat(path: Path) -> FlatImage:
    image = open_flat(path, writable=True)
    assert isinstance(image, FlatImage)
    return image


def abandon(image: Image) -> None:
    """What a killed process does: its files are closed, and nothing else."""
    assert isinstance(image, FlatImage)
    image._data.close()
    image._map.close()


def poke(path: Path, offset: int, layout: str, value: int, seal: tuple[int, int] | None = None) -> None:
    """Overwrite a number in a file; ``seal`` says where what a checksum covers begins, and how long it is."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(layout, value))
        if seal:
            file.seek(seal[0])
            checksum = zlib.crc32(file.read(seal[1]))
            file.write(struct.pack("<I", checksum))


HEADER = (0, 88)


def test_a_new_image_is_absent_from_end_to_end_and_takes_no_space(path: Path) -> None:
    make(path, TIB)
    with open_image(path) as image:
        assert list(image.runs(0, TIB)) == [Run(0, TIB, State.ABSENT)]
        assert image.local_bytes == 0
        assert image.backings == (BACKING,)
        assert not image.is_local(0, 1)
        assert not image.read_now(5, memoryview(bytearray(7)))
        with pytest.raises(OSError) as caught:
            image.write_now(0, bytes(GRAIN))
        assert caught.value.errno == errno.EROFS
    assert path.stat().st_blocks * 512 <= 16 * KIB
    assert path.with_name("x.map").stat().st_blocks * 512 < 3 * MIB


def test_whole_grains_are_written_at_once_and_parts_only_of_what_is_present(path: Path) -> None:
    make(path, MIB + 512)
    with flat(path) as image:
        assert image.write_now(GRAIN, b"a" * GRAIN)
        assert not image.write_now(0, b"a" * 512)
        assert not image.write(0, b"a" * (GRAIN + 512 + GRAIN))
        assert not image.zero(2 * GRAIN, 512)
        assert image.write_now(GRAIN + 5, b"b" * 10)
        assert image.write_now(MIB, b"c" * 512), "the last grain is whole when all its bytes on the disk are"
        assert image.read(GRAIN, 20) == b"aaaaabbbbbbbbbbaaaaa"
        assert image.local_bytes == GRAIN + 512
        assert [(run.state, run.written) for run in image.runs(0, image.size)] == [
            (State.ABSENT, False),
            (State.DATA, True),
            (State.ABSENT, False),
            (State.DATA, True),
        ]


def test_what_is_absent_is_told_by_the_map_alone_in_pieces_that_are_as_long_as_can_be(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it asked for the holes of what is present, each look went through the whole file on tmpfs."""
    make(path)
    with closing(flat(path)) as image:
        image.fill(0, memoryview(bytes(MIB)))
        image.invalidate([(8 * GRAIN, 2 * GRAIN), (10 * GRAIN, GRAIN), (200 * GRAIN, GRAIN)])

        def data(*_: object) -> None:
            raise AssertionError("the file was asked")

        with monkeypatch.context() as patch:
            patch.setattr(image._data, "data", data)
            assert list(image.absent(0, MIB)) == [(8 * GRAIN, 3 * GRAIN), (200 * GRAIN, GRAIN)]
            assert list(image.absent(9 * GRAIN + 512, GRAIN)) == [(9 * GRAIN + 512, GRAIN)]
            assert list(image.absent(20 * GRAIN, GRAIN)) == []


@pytest.fixture
def ends_looked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From where the end of data was looked for; it is remembered for as long as a slow machine takes."""
    places: list[int] = []
    lseek = os.lseek

    def note(fd: int, place: int, whence: int) -> int:
        if whence == os.SEEK_HOLE:
            places.append(place)
        return lseek(fd, place, whence)

    monkeypatch.setattr(os, "lseek", note)
    monkeypatch.setattr(holes, "REMEMBERED", 60.0)
    return places


def test_the_end_of_data_is_looked_for_once_however_many_runs_it_has(
    path: Path, ends_looked_for: list[int]
) -> None:
    """On tmpfs each look goes through all pages up to there, which made a map take minutes."""
    make(path)
    with closing(flat(path)) as image:
        image.fill(0, memoryview(b"x" * MIB))
        for place in range(0, MIB, 4 * GRAIN):
            image.write(place, b"y" * GRAIN)
        found = list(image.runs(0, MIB))
        assert len(found) == MIB // GRAIN // 2
        for place in range(0, MIB, 16 * GRAIN):
            assert list(image.runs(place, 4 * GRAIN)) == found[place // GRAIN // 2 :][:2]
        assert ends_looked_for == [0]
        # A hole is told from then on.
        image.zero(8 * GRAIN, 4 * GRAIN)
        states = [run.state for run in image.runs(0, 13 * GRAIN)]
        assert states == [State.DATA] * 4 + [State.ZERO] + [State.DATA]


def test_a_fetch_stores_zeros_as_holes_whatever_lay_there_and_is_not_the_guests(path: Path) -> None:
    make(path)
    with path.open("r+b") as file:
        file.write(b"stale" * 30000)
    with flat(path) as image:
        data = b"a" * GRAIN + bytes(3 * GRAIN) + b"b" * GRAIN
        assert image.fill(GRAIN, data) == len(data)
        assert image.fill_zero(8 * GRAIN, 8 * GRAIN) == 8 * GRAIN
        assert image.read(GRAIN, len(data)) == data
        assert image.read(8 * GRAIN, 8 * GRAIN) == bytes(8 * GRAIN)
        found = [(run.offset // GRAIN, run.length // GRAIN, run.state) for run in image.runs(0, 16 * GRAIN)]
        assert found == [
            (0, 1, State.ABSENT),
            (1, 1, State.DATA),
            (2, 3, State.ZERO),
            (5, 1, State.DATA),
            (6, 2, State.ABSENT),
            (8, 8, State.ZERO),
        ]
        assert not any(run.written for run in image.runs(0, MIB))
        with pytest.raises(OSError) as caught:
            image.fill(512, bytes(GRAIN))
        assert caught.value.errno == errno.EINVAL


def test_writes_outlive_the_process_and_fetches_need_not(path: Path) -> None:
    make(path)
    image = flat(path)
    image.fill(0, b"f" * 4 * GRAIN)
    image.write_now(2 * GRAIN, b"w" * GRAIN)
    image.write_now(GRAIN + 512, b"p" * 512)
    image.zero(8 * GRAIN, 2 * GRAIN)
    image.log_writes()
    image.write_now(20 * GRAIN, b"n" * GRAIN)
    abandon(image)
    with flat(path) as image:
        assert image.read(2 * GRAIN, GRAIN) == b"w" * GRAIN
        assert image.read(GRAIN, GRAIN) == b"f" * 512 + b"p" * 512 + b"f" * (GRAIN - KIB)
        assert image.read(8 * GRAIN, 2 * GRAIN) == bytes(2 * GRAIN)
        assert not image.is_local(0, GRAIN)
        assert not image.is_local(20 * GRAIN, GRAIN), "nobody was told that it is kept"
        assert image.is_written_certain
    with flat(path) as image:
        assert image.local_bytes == 4 * GRAIN, "closed in good order, all of it is in the bitmaps"


class SlowFile(FileStorage):
    """A file that says when it is written to, and waits until it may be."""

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDWR), path)
        self.writes = 0
        self.writing, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        self.error: OSError | None = None

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.writing.set()
        assert self.go_on.wait(120)
        if self.error:
            raise self.error
        self.writes += 1
        super().write(offset, data)


def on_slow_map(path: Path) -> tuple[FlatImage, SlowFile]:
    """A new image, and the file of its map."""
    make(path)
    data, file = open_file(path, writable=True), SlowFile(path.with_name("x.map"))
    found, boot = read_header(file, "x.map"), current_boot()
    image = FlatImage(data, file, found, "x", writable=True, boot=boot, remove_map=lambda: None)
    file.writes = 0
    file.writing.clear()
    return image, file


def test_many_writes_go_into_the_log_at_once(path: Path) -> None:
    image, file = on_slow_map(path)
    for number in range(16):
        assert image.write_now(3 * number * GRAIN, b"w" * GRAIN)
    assert file.writes == 0
    image.log_writes()
    assert file.writes == 1
    image.log_writes()
    assert file.writes == 1
    abandon(image)
    with flat(path) as image:
        assert image.local_bytes == 16 * GRAIN


def test_a_write_to_what_another_has_just_written_is_kept_only_with_that(path: Path) -> None:
    """The second finds the bits set; they are lost with the process as long as the log lacks the first."""
    image, file = on_slow_map(path)
    assert image.write_now(0, b"a" * GRAIN)
    file.go_on.clear()
    first = threading.Thread(target=image.log_writes)
    first.start()
    assert file.writing.wait(120)
    assert image.write_now(0, b"b" * GRAIN)
    second = threading.Thread(target=image.log_writes)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    file.go_on.set()
    for thread in (first, second):
        thread.join(120)
    abandon(image)
    with flat(path) as image:
        assert image.read(0, GRAIN) == b"b" * GRAIN


def test_a_log_that_cannot_be_written_is_an_error_until_it_can(path: Path) -> None:
    image, file = on_slow_map(path)
    assert image.write_now(0, b"a" * GRAIN)
    file.error = OSError(errno.ENOSPC, "No space left on device")
    for attempt in (image.log_writes, image.log_writes, image.commit, image.flush):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.ENOSPC
    file.error = None
    assert image.write_now(GRAIN, b"b" * GRAIN)
    image.log_writes()
    abandon(image)
    with flat(path) as image:
        assert image.read(0, 2 * GRAIN) == b"a" * GRAIN + b"b" * GRAIN


def test_after_another_boot_only_what_was_flushed_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(path)
    image = flat(path)
    image.write_now(0, b"a" * GRAIN)
    image.flush()
    image.write_now(GRAIN, b"b" * GRAIN)
    abandon(image)
    monkeypatch.setattr(flat_open, "current_boot", lambda: UUID(int=7))
    with flat(path) as image:
        assert [(run.offset, run.length) for run in image.runs(0, MIB) if run.state is State.DATA] == [
            (0, GRAIN)
        ]
        assert not image.is_written_certain
        image.fill_zero(GRAIN, GRAIN)
        assert image.read(GRAIN, GRAIN) == bytes(GRAIN), "what was not flushed is no longer there"


def test_invalidated_ranges_stay_absent_whatever_the_log_said(path: Path) -> None:
    make(path)
    image = flat(path)
    image.write_now(0, b"a" * 8 * GRAIN)
    image.invalidate([(GRAIN + 1, GRAIN)])
    abandon(image)
    with flat(path) as image:
        assert [
            (run.offset // GRAIN, run.length // GRAIN, run.state) for run in image.runs(0, 8 * GRAIN)
        ] == [
            (0, 1, State.DATA),
            (1, 2, State.ABSENT),
            (3, 5, State.DATA),
        ]


def test_a_finished_image_is_the_raw_disk_and_another_process_may_have_it(path: Path) -> None:
    make(path, MIB + 512)
    content = random.Random(1).randbytes(MIB) + bytes(512)
    image = flat(path)
    with pytest.raises(OSError) as caught:
        image.finish()
    assert caught.value.errno == errno.EBUSY
    image.fill(0, content)
    assert image.complete
    image.finish()
    image.finish()
    assert (image.backings, image.raw_fd is not None) == ((), True)
    assert path.read_bytes() == content
    assert not path.with_name("x.map").exists()
    assert image.write_now(3, b"new")
    assert image.zero(512, 512)
    assert image.read(0, 1024) == content[:3] + b"new" + content[6:512] + bytes(512)
    with pytest.raises(ImageError, match="in use"):
        open_file(path, writable=True)
    image.share()
    open_file(path, writable=True).close()
    image.close()
    with open_image(path, writable=True) as raw:
        assert isinstance(raw, RawImage)
        assert raw.complete
        assert raw.read(0, 3) == content[:3]


def test_a_finish_that_was_interrupted_is_finished(path: Path) -> None:
    make(path)
    image = flat(path)
    image.fill_zero(0, MIB)
    image.flush()
    abandon(image)
    os.truncate(path, MIB)
    with open_image(path) as reader:
        assert reader.complete
    assert path.with_name("x.map").exists(), "a reader changes nothing"
    with open_image(path, writable=True) as raw:
        assert isinstance(raw, RawImage)
    assert not path.with_name("x.map").exists()


def other_map(path: Path) -> None:
    make(path.with_name("other"))
    path.with_name("other.map").rename(path.with_name("x.map"))


def cut_trailer_off(path: Path) -> None:
    os.truncate(path, MIB)


def cut_map_off(path: Path) -> None:
    os.truncate(path.with_name("x.map"), DIRECTORY_AT)


def grow(path: Path) -> None:
    trailer = path.read_bytes()[-4096:]
    with path.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(trailer)


def count_too_many(path: Path) -> None:
    poke(path.with_name("x.map"), DIRECTORY_AT, "<H", 40000)


def count_more_written_than_present(path: Path) -> None:
    poke(path.with_name("x.map"), DIRECTORY_AT + 2, "<H", 3)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.with_name("x.map").unlink(), "its map .* is missing: put it back"),
        (other_map, "belongs to another data file"),
        (cut_trailer_off, "has lost its trailer"),
        (lambda path: os.truncate(path, MIB // 2), "it was cut off or replaced"),
        (lambda path: os.truncate(path, 0), "it was cut off or replaced"),
        (grow, "it was cut off or has grown"),
        (cut_map_off, "are needed"),
        (lambda path: os.truncate(path.with_name("x.map"), 0), "not the map of a flat image"),
        (lambda path: path.with_name("x.map").write_bytes(b"NBDFMAP\0"), "checksum"),
        (lambda path: poke(path.with_name("x.map"), 16, "<Q", 2 * MIB), "header's checksum is wrong"),
        (lambda path: poke(path.with_name("x.map"), 4096, "<B", 65), "checksum of the backings"),
        (lambda path: poke(path.with_name("x.map"), 8, "<I", 2, HEADER), "version 2"),
        (lambda path: poke(path.with_name("x.map"), 12, "<I", 4, HEADER), "feature bits 0x4, unknown here"),
        (lambda path: poke(path.with_name("x.map"), 28, "<I", 8, HEADER), "flags 0x8, unknown here"),
        (lambda path: poke(path.with_name("x.map"), 24, "<I", 512, HEADER), "grain is 512"),
        (lambda path: poke(path.with_name("x.map"), 16, "<Q", 1 << 51, HEADER), "cannot have"),
        (lambda path: poke(path.with_name("x.map"), 16, "<Q", 2 * MIB, HEADER), "belongs to another"),
        (lambda path: poke(path, MIB + 20, "<I", 1), "damaged trailer"),
        (count_too_many, "impossible counts"),
        (count_more_written_than_present, "impossible counts"),
    ],
)
def test_what_does_not_belong_together_is_refused_in_one_line(
    path: Path, damage: Callable[[Path], None], complaint: str
) -> None:
    make(path)
    damage(path)
    for writable in (False, True):
        with pytest.raises(ImageError, match=complaint) as caught:
            open_image(path, writable=writable)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)


def test_a_symbolic_link_leads_to_the_image_and_its_map(path: Path, tmp_path: Path) -> None:
    make(path)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to(path)
    with open_image(link, writable=True) as image:
        assert isinstance(image, FlatImage)
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(ImageError, match="no such file"):
        open_image(link)


def test_a_second_process_is_kept_out(path: Path) -> None:
    make(path)
    with flat(path):
        for writable in (False, True):
            with pytest.raises(ImageError, match="in use"):
                open_image(path, writable=writable)
        open_image(path, force_share=True).close()


class Failing(FileStorage):
    """A file whose syncs can fail."""

    failing = False

    def sync(self) -> None:
        if self.failing:
            self._sync_failed = True
            raise OSError(errno.EIO, "Input/output error")
        super().sync()


@pytest.mark.parametrize("which", ["data", "map"])
def test_after_a_failed_sync_nothing_more_is_taken_and_the_log_is_not_believed(
    path: Path, which: str
) -> None:
    make(path)
    data, file = (Failing(os.open(name, os.O_RDWR), name) for name in (path, path.with_name("x.map")))
    header = read_header(file, "x.map")
    image = FlatImage(data, file, header, "x", writable=True, boot=current_boot(), remove_map=lambda: None)
    image.write_now(0, b"a" * GRAIN)
    (file if which == "map" else data).failing = True
    with pytest.raises(OSError):
        image.flush()
    for attempt in (
        image.flush,
        lambda: image.write_now(0, b"b" * GRAIN),
        lambda: image.write(0, b"b" * GRAIN),
        lambda: image.zero(GRAIN, GRAIN),
        lambda: image.fill(GRAIN, bytes(GRAIN)),
        lambda: image.invalidate([(0, GRAIN)]),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EIO
    assert image.read(0, 3) == b"aaa", "reads go on"
    abandon(image)
    with pytest.raises(ImageError, match="check --repair"):
        open_image(path, writable=True)
    assert check_flat(path).corruptions == 1
    assert check_flat(path, repair=True).corruptions_fixed == 1
    with flat(path) as repaired:
        assert not repaired.is_local(0, 1) or which == "map"
        assert not repaired.is_written_certain


def test_a_check_finds_wrong_counts_and_repairs_them(path: Path) -> None:
    make(path, GIB)
    with flat(path) as image:
        image.write(0, b"a" * 5 * GRAIN)
        image.fill(500 * MIB, b"b" * 3 * GRAIN)
    found = check_flat(path)
    assert (found.present, found.written, found.miscounts, found.is_clean) == (8, 5, 0, True)
    poke(path.with_name("x.map"), DIRECTORY_AT, "<H", 77)
    assert check_flat(path).miscounts == 1
    with flat(path) as image:
        assert image.local_bytes == 80 * GRAIN
        assert len(list(image.runs(0, GIB))) == 4
        assert image.local_bytes == 8 * GRAIN, "corrected as soon as the bitmap is read"
        abandon(image)
        image._closed = True
    assert check_flat(path, repair=True).miscounts_fixed == 1
    assert check_flat(path).miscounts == 0


def test_no_damage_to_the_bitmaps_makes_written_what_is_not_present(path: Path) -> None:
    make(path)
    with flat(path) as image:
        image.write(0, b"a" * 5 * GRAIN)
    file = open_file(path.with_name("x.map"))
    place = read_header(file, "x").bitmaps_at
    file.close()
    poke(path.with_name("x.map"), place, "<B", 1)
    with flat(path) as image:
        assert image.is_local(0, GRAIN)
        assert not image.is_local(GRAIN, GRAIN)
        assert not image.write_now(GRAIN, b"x")


def test_sixteen_tebibytes_cost_little_memory_and_no_space(path: Path) -> None:
    size = 16 * TIB - 8 * GRAIN  # the largest file of ext4
    make(path, size)
    tracemalloc.start()
    try:
        with flat(path) as image:
            for number in range(0, 16 * 1024 - 1, 5):
                assert image.write(number * GIB, b"w" * GRAIN)
            assert image.read(5000 * GIB, 2) == b"ww"
            begin, end = 7 * TIB, 12 * TIB
            assert image.fill_zero(begin, end - begin) > 4 * TIB
            assert image.is_local(begin, end - begin)
            assert sum(run.length for run in image.runs(0, size)) == size
            assert image.zero(0, TIB)
            assert image.local_bytes > 6 * TIB
        with flat(path) as image:
            assert image.local_bytes > 6 * TIB
            assert image.read(TIB - 8, 8) == bytes(8)
        assert tracemalloc.get_traced_memory()[1] < 48 * MIB
    finally:
        tracemalloc.stop()
    assert path.stat().st_blocks * 512 < 64 * MIB


@pytest.mark.parametrize("layout", ["flat", "qed"])
def test_no_write_comes_between_a_fetch_s_look_and_its_storing(
    path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fetch gives the write all the time it needs, just after it has looked what is absent."""
    image: FlatImage | QedImage
    if layout == "flat":
        make(path)
        image = flat(path)
        table: object = image._grains
        look = "absent"
    else:
        make_image(path, MIB, backing="nbd://h/", cluster_size=GRAIN)
        image = QedImage.open(path, writable=True)
        table, look = image, "_entries"
    looked, written = threading.Event(), threading.Event()
    original = getattr(table, look)

    def look_and_wait(first: int, second: int) -> object:
        found = original(first, second)
        if threading.current_thread() is fetch:
            looked.set()
            written.wait(0.5)
        return found

    monkeypatch.setattr(table, look, look_and_wait)
    fetch = threading.Thread(target=lambda: image.fill(0, b"f" * GRAIN))
    fetch.start()
    assert looked.wait(120)
    image.write(0, b"w" * GRAIN)
    written.set()
    fetch.join(120)
    assert image.read(0, GRAIN) == b"w" * GRAIN
    image.close()


def test_a_guests_write_wins_over_the_fetch_of_the_same_grains_from_many_threads(
    path: Path, request: pytest.FixtureRequest
) -> None:
    """Without the recheck under the lock some writes would be undone."""
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-5)
    grains = 6000
    make(path, grains * GRAIN)
    barrier = threading.Barrier(2)
    wrong: list[int] = []
    with flat(path) as image:

        def fetch() -> None:
            for grain in range(0, grains, 4):
                barrier.wait(120)
                image.fill(grain * GRAIN, b"f" * 4 * GRAIN)

        def write() -> None:
            for grain in range(0, grains, 4):
                barrier.wait(120)
                for part in range(4):
                    assert image.write_now((grain + part) * GRAIN, b"w" * GRAIN)
                wrong.extend(
                    grain + part for part in range(4) if image.read((grain + part) * GRAIN, 1) != b"w"
                )

        threads = [threading.Thread(target=work) for work in (fetch, write)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not wrong
        assert image.read(0, image.size) == b"w" * image.size
        assert image.complete


def test_reads_and_writes_go_on_while_a_flush_waits_for_the_disk(path: Path) -> None:
    make(path)
    syncing, go_on = threading.Event(), threading.Event()

    class Slow(FileStorage):
        def sync(self) -> None:
            syncing.set()
            assert go_on.wait(120)
            super().sync()

    data = Slow(os.open(path, os.O_RDWR), path)
    file = open_file(path.with_name("x.map"), writable=True)
    assert read_trailer(data, "x")
    image = FlatImage(
        data,
        file,
        read_header(file, "x.map"),
        "x",
        writable=True,
        boot=current_boot(),
        remove_map=lambda: None,
    )
    image.write_now(0, b"a" * GRAIN)
    flushes = [threading.Thread(target=image.flush) for _ in range(2)]
    for flush in flushes:
        flush.start()
    assert syncing.wait(120)
    assert image.write_now(GRAIN, b"b" * GRAIN)
    assert image.fill(2 * GRAIN, b"c" * GRAIN) == GRAIN
    assert image.read(0, 3 * GRAIN) == b"a" * GRAIN + b"b" * GRAIN + b"c" * GRAIN
    assert all(flush.is_alive() for flush in flushes), "no flush returns before the one that covers it"
    go_on.set()
    for flush in flushes:
        flush.join(120)
    image.close()
    assert check_flat(path).is_clean
