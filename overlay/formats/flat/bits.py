"""Ranges of bits in a bitmap whose bit ``i`` is bit ``i % 8`` of byte ``i // 8``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from overlay.formats.ranges import cut


def get(bitmap: bytearray | bytes, begin: int, end: int) -> int:
    """Return the bits from ``begin`` to ``end`` as a number, the first one lowest."""
    first = begin >> 3
    value = int.from_bytes(bitmap[first : (end + 7) >> 3], "little") >> (begin & 7)
    return value & ((1 << (end - begin)) - 1)


def set_all(bitmap: bytearray, begin: int, end: int) -> int:
    """Set the bits from ``begin`` to ``end``; how many were not set before."""
    new = (end - begin) - get(bitmap, begin, end).bit_count()
    if new:
        mask = ((1 << (end - begin)) - 1) << (begin & 7)
        first, last = begin >> 3, (end + 7) >> 3
        value = int.from_bytes(bitmap[first:last], "little") | mask
        bitmap[first:last] = value.to_bytes(last - first, "little")
    return new


def clear_all(bitmap: bytearray, begin: int, end: int) -> int:
    """Clear the bits from ``begin`` to ``end``; how many were set before."""
    old = get(bitmap, begin, end).bit_count()
    if old:
        mask = ((1 << (end - begin)) - 1) << (begin & 7)
        first, last = begin >> 3, (end + 7) >> 3
        value = int.from_bytes(bitmap[first:last], "little") & ~mask
        bitmap[first:last] = value.to_bytes(last - first, "little")
    return old


def masks(
    ranges: Iterable[tuple[int, int]], unit: int, per_map: int, most: int
) -> Iterator[dict[int, bytearray | None]]:
    """Yield bitmaps in which the bits of ranges (offset, length) are 0 and all others 1.

    Bit ``i`` stands for the ``i``-th ``unit`` of the ranges, and is in bitmap ``i // per_map``; None is a
    bitmap without any bit. Each number of a bitmap comes once, in order, with at most ``most`` others.
    """
    found: dict[int, bytearray | None] = {}
    ones, zeros = ((1 << per_map) - 1).to_bytes(per_map // 8, "little"), bytes(per_map // 8)
    current, bitmap = -1, bytearray()
    for number, first, last in cut(ranges, unit, per_map):
        if number != current:
            if len(found) >= most:
                yield found
                found = {}
            found[number] = bitmap = bytearray(ones)
            current = number
        if (first | last) & 7:
            clear_all(bitmap, first, last)
        else:
            bitmap[first >> 3 : last >> 3] = zeros[first >> 3 : last >> 3]
        if last - first == per_map:
            found[number] = None
    if found:
        yield found


def count(bitmap: bytearray | bytes) -> int:
    """Tell how many bits are set."""
    return int.from_bytes(bitmap, "little").bit_count()


def runs(value: int, length: int) -> Iterator[tuple[int, int, bool]]:
    """Yield (begin, end, whether they are set) for the equal neighbours among the lowest ``length`` bits."""
    digits = format(value, f"0{length}b")[::-1]
    begin = 0
    while begin < length:
        is_set = digits[begin] == "1"
        end = digits.find("0" if is_set else "1", begin)
        end = length if end < 0 else end
        yield begin, end, is_set
        begin = end
