"""The mark of a disk that is half committed: neither what it was, nor yet what an overlay makes of it.

``nbd-overlay commit`` (overlay/commit/) writes it over the disk's first 4096 bytes before anything else of
the disk changes, and puts what belongs there in its place after all else is durable:

byte  size
   0     8  magic, "NBDHALF\\0"
   8     4  version, 1
  12    16  UUID of the overlay
  28     4  CRC-32 of the bytes before
  32        a sentence for whoever looks, NULs to the end

So no guest boots from it, nor finds a partition or a file system there, whoever starts it, and after whatever
has ended the command. It is on the disk itself, so it stays with a device and in an image of any format, and
goes where the disk is copied to.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from uuid import UUID
from zlib import crc32

from nbdserve.common.errors import ImageError

MARK_BYTES = 4096
"""Bytes of the disk that it lies over; of a smaller disk all of it."""

_MAGIC = b"NBDHALF\0"
_VERSION = 1
_FIXED = struct.Struct("<8sI16s")
_CRC = struct.Struct("<I")
_LOOK = _FIXED.size + _CRC.size
_SENTENCE = b"This disk is half committed: type the same nbd-overlay commit again, to the end.\n"


def mark(overlay: UUID, length: int) -> bytes:
    """Return the mark, ``length`` bytes of it, of a disk to which this overlay is being committed."""
    fixed = _FIXED.pack(_MAGIC, _VERSION, overlay.bytes)
    return (fixed + _CRC.pack(crc32(fixed)) + _SENTENCE).ljust(MARK_BYTES, b"\0")[:length]


def mark_of(first: bytes) -> UUID | None:
    """Return whose mark a disk's first bytes are; None where they are none."""
    if len(first) < _LOOK or first[:8] != _MAGIC:
        return None
    if _CRC.unpack_from(first, _FIXED.size)[0] != crc32(first[: _FIXED.size]):
        return None
    return UUID(bytes=_FIXED.unpack_from(first)[2])


def refuse_half_committed(read_into: Callable[[int, memoryview], None], size: int, name: str) -> None:
    """Raise ImageError where a disk is half committed; one that cannot be read there is not told apart."""
    first = bytearray(min(_LOOK, size))
    try:
        read_into(0, memoryview(first))
    except OSError:
        return  # whoever reads it is told
    overlay = mark_of(bytes(first))
    if overlay is not None:
        raise ImageError(
            f"{name}: half committed, from the overlay {overlay}, so it is neither the old disk nor the new "
            "one; type that nbd-overlay commit again, to its end"
        )
