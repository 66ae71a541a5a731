"""The bytes of a redo log: its header, chunks, and the records in them. Integers are little-endian.

docs/mirror-format.md has the whole layout. A log is a sequence of bytes, each with a position of its own
that is never used again. It consists of chunks, some of which make a batch: all of it is valid, or none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID
from zlib import crc32

from nbdserve.common.errors import ImageError

GRAIN = 4096
"""Bytes: records begin at multiples of it, and end at one or where the disk does."""
PAGE = 4096
"""Bytes of the page at which a log's sender asks and commands; the first chunk has this position."""
LONGEST_DATA = 256 << 10
"""Most bytes of a record's data."""
LONGEST_ZERO = 1 << 31
"""Most bytes that one record makes zeros."""
LONGEST_CHUNK = 2 << 20
"""Most bytes of a chunk, its header included: what a receiver must be able to hold."""

DATA, ZERO = 0, 1
"""Kinds of a record: data follow; the range reads as zeros."""
POINT = 1
"""Flag of a batch's last chunk."""

NOBODY = UUID(int=0)

_MAGIC, _CHUNK_MAGIC, _TELL_MAGIC, _COMMIT_MAGIC = b"NBDREDO\0", b"NBDR", b"NBDMTEL\0", b"NBDMCOM\0"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQ16s16sQQQ")
_CHUNK = struct.Struct("<4sIQ16sIIQQ")
_COMMIT = struct.Struct("<8sII16sQ")
_CRC = struct.Struct("<I")
RECORD = struct.Struct("<QII")
"""Of a record: offset, length in bytes, kind."""
CHUNK_HEADER_BYTES = 64


class Point(NamedTuple):
    """What a mirror holds: the disk as of an instant."""

    number: int
    """0: nothing has come yet, the disk is the backing's."""
    nanoseconds: int
    """Since 1970, by the clock of who sent it."""


NO_POINT = Point(0, 0)


@dataclass(frozen=True, slots=True)
class Header:
    """What a log says of itself, and, in the same words, a receiver to who asks it."""

    size: int
    """Of the disk, in bytes."""
    image: UUID
    """The mirror's image."""
    source: UUID = NOBODY
    """The image whose guest's writes come; NOBODY until the first batch."""
    position: int = PAGE
    """Of a log: that of the first byte behind its header. Told: where the next batch begins."""
    point: Point = NO_POINT

    def pack(self) -> bytes:
        """Return the log's first page."""
        return self._packed(_MAGIC)

    def tell(self) -> bytes:
        """Return the page that a receiver shows."""
        return self._packed(_TELL_MAGIC)

    def _packed(self, magic: bytes) -> bytes:
        return _sealed(
            _HEADER.pack(
                magic, _VERSION, 0, self.size, self.image.bytes, self.source.bytes, self.position, *self.point
            )
        ).ljust(PAGE, b"\0")


def read_header(raw: bytes, name: str) -> Header:
    """Return a log's header; ImageError if it is none, or damaged."""
    return _read_header(raw, _MAGIC, f"{name}: not the redo log of a mirror")


def read_told(raw: bytes, name: str) -> Header:
    """Return what a receiver shows; ImageError if it is none."""
    return _read_header(raw, _TELL_MAGIC, f"{name}: not nbd-overlay receive")


def _read_header(raw: bytes, magic: bytes, wrong: str) -> Header:
    if raw[:8] != magic or not _is_sealed(raw, _HEADER.size):
        raise ImageError(f"{wrong}, or damaged; check the path")
    _, version, _, size, image, source, position, number, nanoseconds = _HEADER.unpack_from(raw)
    if version != _VERSION:
        raise ImageError(f"{wrong} of a version that is known here: {version}; use a newer program")
    return Header(size, UUID(bytes=image), UUID(bytes=source), position, Point(number, nanoseconds))


@dataclass(frozen=True, slots=True)
class Commit:
    """A sender's command: the batch of ``source`` that ends at ``position`` counts."""

    source: UUID
    position: int

    def pack(self) -> bytes:
        """Return what is written to the receiver's page."""
        return _sealed(_COMMIT.pack(_COMMIT_MAGIC, _VERSION, 0, self.source.bytes, self.position)).ljust(
            PAGE, b"\0"
        )


def read_commit(raw: bytes) -> Commit | None:
    """Return a command; None if it is none."""
    if raw[:8] != _COMMIT_MAGIC or len(raw) != PAGE or not _is_sealed(raw, _COMMIT.size):
        return None
    _, version, _, source, position = _COMMIT.unpack_from(raw)
    return Commit(UUID(bytes=source), position) if version == _VERSION else None


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """What stands before a chunk's payload."""

    position: int
    batch: UUID
    """Of all chunks of one attempt to send a batch, and of no others."""
    length: int
    """Of the payload, in bytes."""
    crc: int
    point: Point | None = None
    """What the mirror holds after this chunk, if it ends its batch."""

    @property
    def end(self) -> int:
        """Tell where the next chunk begins."""
        return self.position + CHUNK_HEADER_BYTES + self.length

    def pack(self) -> bytes:
        """Return the header as it lies in the log."""
        flags, point = (0, NO_POINT) if self.point is None else (POINT, self.point)
        return _sealed(
            _CHUNK.pack(_CHUNK_MAGIC, flags, self.position, self.batch.bytes, self.length, self.crc, *point)
        ).ljust(CHUNK_HEADER_BYTES, b"\0")


def read_chunk_header(raw: bytes, position: int) -> ChunkHeader | None:
    """Return the header of a chunk at a position; None where there is none, or another's is left."""
    if raw[:4] != _CHUNK_MAGIC or len(raw) < CHUNK_HEADER_BYTES or not _is_sealed(raw, _CHUNK.size):
        return None
    _, flags, said, batch, length, crc, number, nanoseconds = _CHUNK.unpack_from(raw)
    if said != position or flags & ~POINT or length > LONGEST_CHUNK - CHUNK_HEADER_BYTES:
        return None
    point = Point(number, nanoseconds) if flags & POINT else None
    return ChunkHeader(position, UUID(bytes=batch), length, crc, point)


def chunk(position: int, batch: UUID, records: Iterable[bytes | bytearray], point: Point | None) -> bytes:
    """Return a whole chunk of packed records."""
    payload = b"".join(records)
    return ChunkHeader(position, batch, len(payload), crc32(payload), point).pack() + payload


class Record(NamedTuple):
    """One change of the disk; the range reads as zeros where there are no data."""

    offset: int
    length: int
    data: memoryview | None


def records(payload: bytes | bytearray | memoryview, size: int) -> Iterator[Record]:
    """Yield the records of a chunk for a disk of ``size`` bytes; ImageError where it makes no sense."""
    view, place = memoryview(payload), 0
    while place < len(view):
        if len(view) - place < RECORD.size:
            raise ImageError("a chunk ends within a record")
        offset, length, kind = RECORD.unpack_from(view, place)
        place += RECORD.size
        end = offset + length
        if offset % GRAIN or not length or end > size or (end % GRAIN and end < size):
            raise ImageError(f"a record of {length} bytes at {offset} is not of whole grains of the disk")
        if kind == ZERO:
            yield Record(offset, length, None)
            continue
        if kind != DATA or length > len(view) - place:
            raise ImageError(f"a record of kind {kind} with {length} bytes does not fit into its chunk")
        yield Record(offset, length, view[place : place + length])
        place += length


def zero_records(offset: int, length: int) -> bytes:
    """Return the records that make a range of whole grains read as zeros."""
    parts = range(0, length, LONGEST_ZERO)
    return b"".join(RECORD.pack(offset + at, min(LONGEST_ZERO, length - at), ZERO) for at in parts)


def _sealed(fixed: bytes) -> bytes:
    return fixed + _CRC.pack(crc32(fixed))


def _is_sealed(raw: bytes, length: int) -> bool:
    return len(raw) >= length + _CRC.size and bool(_CRC.unpack_from(raw, length)[0] == crc32(raw[:length]))
