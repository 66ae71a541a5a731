"""QEMU's return path: what a destination's QEMU tells the source's while it loads, read as it passes.

Its messages (QEMU's migration/savevm.c and migration.c, 7.2 to 10) are a type and a length, numbers of 16
bits in network order, and as many bytes. The last is SHUT, with 0 where all was loaded: also after
post-copy.
"""

from __future__ import annotations

import struct
from enum import Enum, auto

_HEADER = struct.Struct(">HH")
_SHUT, _BITMAP = 1, 5
_MOST = 512
"""The longest message that QEMU itself takes, in bytes."""


class Verdict(Enum):
    """What is known of the loading."""

    UNDER_WAY = auto()
    LOADED = auto()
    FAILED = auto()
    UNKNOWN = auto()
    """What was said is not understood: nothing can be told of it any more."""


class ReturnPath:
    """Reads the messages, however they are cut."""

    def __init__(self) -> None:
        self.verdict = Verdict.UNDER_WAY
        self.heard = False
        """Whether anything was said at all."""
        self._partial = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take what has passed."""
        self.heard = self.heard or len(data) > 0
        if self.verdict is not Verdict.UNDER_WAY:
            return
        self._partial += data
        at = 0
        while self.verdict is Verdict.UNDER_WAY and len(self._partial) - at >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._partial, at)
            # Behind a bitmap, which only the recovery of a post-copy asks for, raw bytes follow.
            if length > _MOST or kind == _BITMAP or (kind == _SHUT and length != 4):
                self.verdict = Verdict.UNKNOWN
                break
            end = at + _HEADER.size + length
            if len(self._partial) < end:
                break
            if kind == _SHUT:
                failed = any(self._partial[at + _HEADER.size : end])
                self.verdict = Verdict.FAILED if failed else Verdict.LOADED
            at = end
        del self._partial[:at]
        if self.verdict is not Verdict.UNDER_WAY:
            self._partial.clear()
