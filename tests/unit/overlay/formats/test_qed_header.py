"""The QED header: what is written can be read, and what the spec forbids is refused in one line."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.common.errors import ImageError, UsageError
from overlay.formats.image import Backing
from overlay.formats.qed.create import new_header
from overlay.formats.qed.header import HEADER_BYTES, MAX_IMAGE_SIZE, Feature, Header, read_header
from tests.support.simulation import SimulatedDisk

GIB = 1 << 30
FILE_SIZE = 1 << 24


def good_header() -> Header:
    return new_header(GIB, Backing("nbd://h/disk", raw=True))


def parse(header: Header, file_size: int = FILE_SIZE) -> Header:
    return Header.parse(header.pack(), file_size, "x.qed")


def test_the_fields_lie_where_the_spec_says() -> None:
    data = replace(good_header(), compat_features=7, autoclear_features=9).pack()
    assert data[:4] == b"QED\0"
    assert struct.unpack_from("<III", data, 4) == (65536, 4, 1)
    assert struct.unpack_from("<QQQ", data, 16) == (5, 7, 9)
    assert struct.unpack_from("<QQ", data, 40) == (65536, GIB)
    assert struct.unpack_from("<II", data, 56) == (64, len("nbd://h/disk"))
    assert len(data) == HEADER_BYTES == 64


headers = st.builds(
    new_header,
    st.integers(1, 1 << 36),
    st.none() | st.builds(Backing, st.text(st.characters(codec="utf-8"), min_size=1, max_size=200).filter(
        lambda name: "\0" not in name), st.booleans()),
    st.sampled_from([1 << bits for bits in range(13, 21)]),
    st.sampled_from([4, 8, 16]),
)  # fmt: skip


@given(headers, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_what_is_packed_is_parsed_again(header: Header, compat: int, autoclear: int) -> None:
    header = replace(header, compat_features=compat, autoclear_features=autoclear)
    assert parse(header, header.l1_table_offset + header.table_bytes) == header


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("features", 0x08, "feature bits 0x8, unknown"),
        ("features", 1 << 63, "unknown"),
        ("cluster_size", 0, "cluster size"),
        ("cluster_size", 2048, "cluster size"),
        ("cluster_size", 65535, "cluster size"),
        ("cluster_size", 1 << 27, "cluster size"),
        ("cluster_size", 0xFFFFFFFF, "cluster size"),
        ("table_size", 0, "table size"),
        ("table_size", 3, "table size"),
        ("table_size", 32, "table size"),
        ("header_size", 0, "header's own size"),
        ("header_size", 2, "L1 table"),
        ("header_size", 0xFFFFFFFF, "L1 table"),
        ("l1_table_offset", 0, "L1 table"),
        ("l1_table_offset", 65536 + 512, "L1 table"),
        ("l1_table_offset", FILE_SIZE, "L1 table"),
        ("l1_table_offset", FILE_SIZE - 3 * 65536, "L1 table"),
        ("l1_table_offset", 2**64 - 65536, "L1 table"),
        ("image_size", 513, "multiple of 512"),
        ("image_size", (1 << 46) + 512, "its tables map"),
        ("image_size", 2**64 - 512, "its tables map"),
        ("backing_filename_size", 0, "backing name's length"),
        ("backing_filename_size", 4096, "backing name's length"),
        ("backing_filename_size", 0xFFFFFFFF, "backing name's length"),
        ("backing_filename_offset", 0, "backing name's bytes"),
        ("backing_filename_offset", 63, "backing name's bytes"),
        ("backing_filename_offset", 65536 - 4, "backing name's bytes"),
        ("backing_filename_offset", 0xFFFFFFFF, "backing name's bytes"),
    ],
)
def test_a_field_out_of_range_is_refused_in_one_line(field: str, value: int, complaint: str) -> None:
    assert parse(good_header()) == good_header()
    with pytest.raises(ImageError, match=complaint) as caught:
        parse(replace(good_header(), **{field: value}))
    assert str(caught.value).startswith("x.qed: ")
    assert "\n" not in str(caught.value)


def test_the_largest_disk_is_bounded_by_the_tables_and_by_qemu() -> None:
    small = replace(good_header(), cluster_size=4096, table_size=2, l1_table_offset=4096)
    assert small.largest_image == 1024 * 1024 * 4096
    assert replace(good_header(), cluster_size=1 << 26, table_size=16).largest_image == MAX_IMAGE_SIZE
    assert parse(replace(good_header(), image_size=1 << 46)).image_size == 1 << 46


def test_a_backing_name_without_its_feature_is_not_looked_at() -> None:
    header = replace(good_header(), features=0, backing_filename_offset=0xFFFFFFFF, backing_filename_size=5)
    assert parse(header) == header


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_file_too_short_for_the_magic_is_not_an_image(length: int) -> None:
    with pytest.raises(ImageError, match="not a QED image"):
        Header.parse(good_header().pack()[:length], length, "x.qed")


@pytest.mark.parametrize("length", [4, 63])
def test_a_file_that_ends_within_the_header_is_damaged(length: int) -> None:
    with pytest.raises(ImageError, match=f"within the header, after {length} bytes"):
        Header.parse(good_header().pack()[:length], length, "x.qed")


def test_a_file_cut_off_within_the_l1_table_is_damaged() -> None:
    end = 65536 * 5
    assert parse(good_header(), end)
    with pytest.raises(ImageError, match="L1 table"):
        parse(good_header(), end - 1)


@pytest.mark.parametrize("name", ["nbd://h/disk", "/a/b c", "\udcff\udcfe", "ä" * 30])
def test_the_backing_is_read_back_whatever_its_bytes(name: str) -> None:
    for raw in (True, False):
        backing = Backing(name, raw)
        header = new_header(GIB, backing)
        content = header.pack() + name.encode(errors="surrogateescape")
        disk = SimulatedDisk.holding(content.ljust(65536 * 5, b"\0"))
        assert read_header(disk, "x.qed") == (header, backing)
        assert bool(header.features & Feature.BACKING_FORMAT_NO_PROBE) is raw


def test_a_backing_name_with_a_nul_is_refused() -> None:
    header = new_header(GIB, Backing("abc", raw=True))
    with pytest.raises(ImageError, match="NUL"):
        read_header(SimulatedDisk.holding((header.pack() + b"a\0c").ljust(65536 * 5, b"\0")), "x.qed")


@pytest.mark.parametrize(
    ("size", "cluster_size", "table_size", "complaint"),
    [
        (0, 65536, 4, "disk of 0 bytes"),
        (-512, 65536, 4, "impossible"),
        ((1 << 46) + 1, 65536, 4, "64 TiB"),
        (GIB, 65537, 4, "power of two"),
        (GIB, 2048, 4, "power of two"),
        (GIB, 1 << 27, 4, "power of two"),
        (GIB, 65536, 1, "QEMU opens"),
        (GIB, 65536, 5, "QEMU opens"),
        (GIB, 1 << 22, 4, "no QEMU opens images with clusters of 4 MiB"),
        (GIB, 1 << 26, 2, "no QEMU opens"),
    ],
)
def test_an_image_that_cannot_be_is_a_usage_error(
    size: int, cluster_size: int, table_size: int, complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        new_header(size, None, cluster_size, table_size)


def test_a_backing_name_must_fit_into_the_header_cluster() -> None:
    assert new_header(GIB, Backing("x" * 4095, raw=True)).backing_filename_size == 4095
    for length, cluster_size in ((4096, 65536), (4096 - 63, 4096)):
        with pytest.raises(UsageError, match="too many"):
            new_header(GIB, Backing("x" * length, raw=True), cluster_size)


@pytest.mark.parametrize(("size", "rounded"), [(1, 512), (512, 512), (513, 1024), (1000, 1024)])
def test_sizes_are_rounded_up_to_sectors_as_qemu_does(size: int, rounded: int) -> None:
    assert new_header(size, None).image_size == rounded
