"""Damaged QED images of every kind: one line, no traceback, no hang, no memory that the damage asks for."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdserve.common.errors import ImageError
from overlay.cli import main as cli
from overlay.formats.image import Backing, State
from overlay.formats.qed.check import check
from overlay.formats.qed.create import new_header
from overlay.formats.qed.header import HEADER_BYTES, Feature, Header, read_header
from overlay.formats.qed.image import QedImage
from tests.support.simulation import SimulatedDisk

MIB = 1 << 20
CLUSTER, TABLE = 4096, 2
L1 = CLUSTER
MEMORY = 32 * MIB
"""More than any image of these tests may cost, with its caches: far less than a wrong number could claim."""


def sound_image() -> bytes:
    """An image with two L2 tables, data, zeros and a backing's name."""
    backing = Backing("nbd://h/disk", raw=True)
    header = new_header(12 * MIB, backing, CLUSTER, TABLE)
    content = (header.pack() + backing.name.encode()).ljust(L1 + header.table_bytes, b"\0")
    disk = SimulatedDisk.holding(content)
    with QedImage(disk, "x.qed", writable=True) as image:
        image.write(0, b"a" * CLUSTER * 3)
        image.zero(MIB, 4 * CLUSTER)
        image.write(9 * MIB, b"b" * CLUSTER)
        image.write(MIB // 2, b"c" * CLUSTER)
    return bytes(disk.content)


SOUND = sound_image()
L2 = struct.unpack_from("<Q", SOUND, L1)[0]

borders = [0, 1, 2, 3, 511, 512, 4095, 4096, 4097, 8192, L1, L2, len(SOUND), len(SOUND) - CLUSTER]
borders += [1 << 31, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - CLUSTER, (1 << 64) - 1]
clusters = st.integers(0, 40).map(lambda cluster: cluster * CLUSTER)
values = st.sampled_from(borders) | st.integers(0, (1 << 64) - 1) | clusters
words = [(offset, "<I") for offset in (0, 4, 8, 12, 56, 60)]
fields = st.sampled_from(words + [(offset, "<Q") for offset in (16, 24, 32, 40, 48)])
entries = st.tuples(
    st.sampled_from([L1, L2]).flatmap(lambda table: st.integers(0, 12).map(lambda i: table + 8 * i)),
    st.just("<Q"),
)
pokes = st.tuples(
    fields | entries | entries | st.tuples(st.integers(0, len(SOUND) - 8), st.just("<Q")), values
)
lengths = st.none() | st.none() | st.integers(0, len(SOUND) + 3 * CLUSTER)


def damaged(changes: list[tuple[tuple[int, str], int]], length: int | None) -> bytes:
    content = bytearray(SOUND)
    for (offset, layout), value in changes:
        struct.pack_into(layout, content, offset, value & ((1 << 8 * struct.calcsize(layout)) - 1))
    return bytes(content if length is None else content[:length].ljust(length, b"\0"))


damages = st.builds(damaged, st.lists(pokes, min_size=0, max_size=4), lengths)


def use(content: bytes, *, writable: bool) -> bool:
    """Open an image and touch all of it; False if that was refused as it should be."""
    disk = SimulatedDisk.holding(content)
    try:
        image = QedImage(disk, "x.qed", writable=writable)
        for run in image.runs(0, image.size):
            if run.state is State.DATA:
                assert len(image.read(run.offset, run.length)) == run.length
        if writable and image.size:
            image.zero(0, min(image.size, 2 * CLUSTER))
            image.write(0, b"z" * min(image.size, CLUSTER))
            image.close()
            assert QedImage(disk, "x.qed", writable=False).read(0, 1) == b"z"
    except ImageError as error:
        complaint = str(error)
    else:
        return True
    assert complaint.startswith("x.qed: ")
    assert "\n" not in complaint
    return False


@settings(max_examples=400, deadline=60_000)
@given(damages)
def test_a_damaged_image_is_refused_or_works(content: bytes) -> None:
    tracemalloc.start()
    try:
        use(content, writable=False)
        use(content, writable=True)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


@settings(max_examples=400, deadline=60_000)
@given(damages)
def test_an_image_that_passes_the_check_works_and_repair_makes_it_pass_or_says_that_it_does_not(
    content: bytes,
) -> None:
    disk = SimulatedDisk.holding(content)
    try:
        header, _ = read_header(disk, "x.qed")
    except ImageError:
        return
    report = check(disk, header)
    assert bytes(disk.content) == content, "a check changes nothing"
    if not report.corruptions:
        assert use(content, writable=False)
        assert use(content, writable=True)
    repaired = check(disk, header, repair=True)
    header, _ = read_header(disk, "x.qed")
    again = check(disk, header)
    assert (again.corruptions, again.leaks) == (repaired.corruptions, repaired.leaks)
    assert repaired.corruptions + repaired.corruptions_fixed == report.corruptions
    if not repaired.corruptions:
        assert not header.features & Feature.NEED_CHECK
        assert use(bytes(disk.content), writable=True)


@settings(max_examples=60, deadline=60_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damages | st.binary(max_size=200).map(lambda tail: b"QED\0" + tail),
    st.sampled_from(["info", "check", "map"]),
)
def test_the_command_answers_every_file_with_a_result_or_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, command: str
) -> None:
    path = tmp_path / "x.qed"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["nbd-overlay", command, str(path)])
        code = cli.main()
    captured = capsys.readouterr()
    assert code in (0, 1)
    found_corruptions = command == "check" and captured.out
    assert len(captured.err.splitlines()) == (code == 1 and not found_corruptions)
    assert path.read_bytes() == content


@settings(max_examples=200)
@given(st.binary(max_size=HEADER_BYTES + 8), st.integers(0, 1 << 63))
def test_any_bytes_are_refused_or_a_header_whose_tables_the_file_has(data: bytes, size: int) -> None:
    data = b"QED\0" + data
    try:
        header = Header.parse(data, size, "x.qed")
    except ImageError:
        return
    assert header.l1_table_offset + header.table_bytes <= size
    assert header.pack() == data[:HEADER_BYTES]
