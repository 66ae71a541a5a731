"""Ranges of bytes as bitmaps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from overlay.formats.flat import bits

UNIT, PER_MAP = 4096, 32
END = 10 * PER_MAP * UNIT
ranges = st.lists(st.tuples(st.integers(0, END), st.integers(0, END // 2)), max_size=8)


@given(ranges, st.integers(1, 4))
def test_masks_lack_the_units_of_which_a_range_has_a_byte_and_no_others(
    given: list[tuple[int, int]], most: int
) -> None:
    wanted = {
        unit
        for offset, length in given
        for unit in range(offset // UNIT, -(-(offset + length) // UNIT) if length else 0)
    }
    found: set[int] = set()
    numbers: list[int] = []
    for part in bits.masks(given, UNIT, PER_MAP, most):
        assert len(part) <= most
        for number, bitmap in part.items():
            numbers.append(number)
            value = 0 if bitmap is None else int.from_bytes(bitmap, "little")
            found |= {number * PER_MAP + i for i in range(PER_MAP) if not value >> i & 1}
    assert found == wanted
    assert numbers == sorted(set(numbers))
