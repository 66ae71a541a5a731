"""What a guest will miss next: nothing, unless it reads on where it, or another reader, was before."""

from __future__ import annotations

import threading
from collections import OrderedDict

FIRST, LARGEST = 128 << 10, 4 << 20
"""Bytes that are read ahead of a sequential reader: the first, then twice as many each time."""

_READERS = 16
_NEAR = 64 << 10
"""How far behind the end of what was read a reader may go on, in bytes: it may skip a little."""


class ReadAhead:
    """Recognises sequential readers among what is missed. Safe for several threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        # Where each reader is expected next, and how much was read ahead for it last.
        self._readers: OrderedDict[int, int] = OrderedDict()

    def after(self, offset: int, length: int) -> tuple[int, int] | None:
        """Return (offset, length) to read ahead after this range was missed; None if that looks random."""
        end = offset + length
        with self._lock:
            for expected, window in self._readers.items():
                if expected - window - _NEAR <= offset <= expected + _NEAR:
                    break
            else:
                self._expect(end, 0)
                return None
            del self._readers[expected]
            window = min(max(FIRST, 2 * window), LARGEST)
            begin = max(end, expected)
            ahead = min(window, self._size - begin)
            if ahead <= 0:
                return None
            self._expect(begin + ahead, window)
        return begin, ahead

    def _expect(self, offset: int, window: int) -> None:
        self._readers[offset] = window
        if len(self._readers) > _READERS:
            self._readers.popitem(last=False)
