"""How a range is cut into requests that a server takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.exports import PLAIN


@given(
    block=st.sampled_from([0, 1, 512, 4096, 65536]),
    offset=st.integers(0, 1 << 20),
    length=st.integers(1, 1 << 20),
    longest=st.integers(16 << 10, 1 << 20),
)
def test_pieces_make_up_the_range_end_with_blocks_and_are_never_too_long(
    block: int, offset: int, length: int, longest: int
) -> None:
    export, end = replace(PLAIN, minimum_block=block), offset + length
    step = block or 1
    while offset < end:
        piece = export.piece(offset, end - offset, longest)
        assert 0 < piece <= end - offset
        assert offset % step + piece <= max(longest, step)
        offset += piece
        assert offset == end or offset % step == 0


@pytest.mark.parametrize(("maximum", "carried"), [(0, 1 << 20), (64 << 10, 64 << 10), (1 << 25, 1 << 20)])
def test_one_request_carries_what_is_wanted_up_to_what_the_server_takes(maximum: int, carried: int) -> None:
    assert replace(PLAIN, maximum_block=maximum).payload(1 << 20) == carried
