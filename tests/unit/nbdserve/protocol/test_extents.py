"""Arithmetic on extents."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from nbdserve.protocol.extents import Extent, coalesce, descriptors

EXTENTS = st.lists(st.builds(Extent, st.integers(0, 2**34), st.integers(0, 3)), max_size=12)


def total(extents: list[Extent]) -> int:
    return sum(extent.length for extent in extents)


@given(EXTENTS)
def test_coalescing_keeps_the_length_and_leaves_no_equal_neighbours(extents: list[Extent]) -> None:
    joined = list(coalesce(extents))
    assert total(joined) == total(extents)
    assert all(extent.length for extent in joined)
    assert all(a.flags != b.flags for a, b in pairwise(joined))


@given(EXTENTS, st.integers(1, 20))
def test_descriptors_fit_32_bits_and_stop_at_the_limit(extents: list[Extent], limit: int) -> None:
    found = descriptors(extents, limit=limit, longest=2**32 - 4096)
    assert len(found) <= limit
    assert all(0 < extent.length <= 2**32 - 4096 for extent in found)
    if len(found) < limit:
        assert total(found) == total(extents)


def test_a_run_too_long_for_one_descriptor_is_split() -> None:
    found = descriptors([Extent(4096 + 5, 3)], limit=9, longest=4096)
    assert found == [Extent(4096, 3), Extent(5, 3)]
