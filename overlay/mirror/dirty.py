"""Which parts of a disk a mirror lacks, where it was not noted what was written there."""

from __future__ import annotations

from collections.abc import Iterator

_FINEST = 64 << 10
_MOST_UNITS = 1 << 20


class Dirty:
    """Parts of a disk, in units of 64 KiB, or larger ones where the disk has very many. Not thread-safe."""

    def __init__(self, size: int) -> None:
        unit = _FINEST
        while size > unit * _MOST_UNITS:
            unit *= 2
        self._unit, self._size = unit, size
        self._units = bytearray(-(-size // unit))
        self.count = 0

    def __bool__(self) -> bool:
        return bool(self.count)

    @property
    def bytes(self) -> int:
        """Return how many bytes they have, at most."""
        return min(self.count * self._unit, self._size)

    def add(self, offset: int, length: int) -> None:
        """A range is one of them."""
        if not length:
            return
        first, end = offset // self._unit, -(-(offset + length) // self._unit)
        self.count += self._units.count(0, first, end)
        self._units[first:end] = b"\1" * (end - first)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield them as offset and length, in order."""
        begin = self._units.find(1)
        while begin >= 0:
            end = self._units.find(0, begin)
            end = len(self._units) if end < 0 else end
            yield begin * self._unit, min(end * self._unit, self._size) - begin * self._unit
            begin = self._units.find(1, end)
