"""Sizes as operators write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.common.errors import UsageError
from nbdserve.common.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512b", 512),
        ("64K", 65536),
        ("64k", 65536),
        ("1.5G", 3 << 29),
        ("10GiB", 10 << 30),
        ("1TB", 1 << 40),
        ("7E", 7 << 60),
    ],
)
def test_units_are_binary(text: str, size: int) -> None:
    assert parse_size(text, "--size") == size


@pytest.mark.parametrize(
    "text", ["", "-1", "1X", "K", "1 G", "1.0001K", "0x10", "1e3", "9" * 50, "١", "1KK", "nan"]
)
def test_what_is_not_a_whole_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--size .* is not a size") as caught:
        parse_size(text, "--size")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 40, "1 TiB"),
        (1023 << 20, "1023 MiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_fitting_unit(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 60))
def test_a_size_in_bytes_means_itself(size: int) -> None:
    assert parse_size(str(size), "--size") == size
