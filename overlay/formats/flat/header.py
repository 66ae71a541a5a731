"""The fixed parts of a flat image: the trailer behind the data, the map's header. Integers are little-endian.

The data file holds the disk from offset 0. While part of it is missing, a trailer follows, at the disk's size
rounded up to 4096:

byte  size
   0     8  magic, "NBDFDAT\\0"
   8     4  version, 1
  12     4  flags: FAILED if a sync of the map has failed, ON_DEVICE
  16     8  size of the disk, in bytes
  24    16  UUID, also in the map
  40     4  CRC-32 of the bytes before
  44        zeros, to 4096

On a block device it lies over the device's last 4096 bytes, which the map keeps meanwhile, and has also

  44     4  CRC-32 of the next 464 bytes
  48   464  the map's absolute path, NULs behind it

The map, in IMAGE.map, begins with a header, of which each change is one write within one sector:

byte  size
   0     8  magic, "NBDFMAP\\0"
   8     4  version, 1
  12     4  features: a program that does not know a bit must not open the image
  16     8  size of the disk, in bytes
  24     4  grain, in bytes: 4096
  28     4  flags: CLEAN, FAILED, UNCERTAIN, REOPENED, COMMITTED, REDO
  32    16  UUID, also in the data's trailer
  48    16  boot in which the log was written (/proc/sys/kernel/random/boot_id)
  64    16  generations of the log's two halves, 8 bytes each: records of others do not count
  80     4  length of the backings, in bytes
  84     4  CRC-32 of the backings
  88     4  CRC-32 of the bytes before

With the feature ON_DEVICE also

  92     4  CRC-32 of the bytes 96 to 511
  96     8  size of the device, in bytes
 104   408  the device's path, NULs behind it: for people

The map goes on with

4096        the backings' URIs in UTF-8, a NUL behind each
32768       the log: two halves of 1 MiB, see log.py
2129920     the directory: 4 bytes for each 128 MiB of disk, see grains.py
            from the next multiple of 4096 on, the bitmaps: 8192 bytes for each 128 MiB of disk
            behind them, with ON_DEVICE, the 4096 bytes in whose place the trailer lies
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from enum import IntFlag
from uuid import UUID
from zlib import crc32

from nbdserve.common.errors import ImageError
from overlay.formats.image import Backing
from overlay.formats.storage import Storage

TRAILER_MAGIC, MAP_MAGIC = b"NBDFDAT\0", b"NBDFMAP\0"
VERSION = 1
GRAIN = 4096
SECTOR = 512
TRAILER_BYTES = 4096
MAX_SIZE = 1 << 50
"""Largest disk, 1 PiB. Its directory has 32 MiB: all the memory that a header can ask for."""

BACKINGS_AT = 4096
LOG_AT = 32768
MAX_BACKINGS = LOG_AT - BACKINGS_AT
LOG_HALF_BYTES = 1 << 20
DIRECTORY_AT = LOG_AT + 2 * LOG_HALF_BYTES

CHUNK_GRAINS = 32768
"""Grains, 128 MiB, that have an entry in the directory and a pair of bitmaps of their own."""
ENTRY_BYTES = 4
PAIR_BYTES = 2 * CHUNK_GRAINS // 8

_TRAILER = struct.Struct("<8sIIQ16s")
_HEADER = struct.Struct("<8sIIQII16s16sQQII")
_CRC = struct.Struct("<I")
_DEVICE = struct.Struct("<Q408s")
_DEVICE_AT = 96
_MAP_AT = 48
MAX_MAP_PATH = SECTOR - _MAP_AT - 1
"""Bytes of the map's path in a trailer on a device: all of that lies in one sector."""
MAX_DEVICE_PATH = 407


class Feature(IntFlag):
    """Bits of ``features``, each of which a program must know."""

    ON_DEVICE = 1
    """The data is on a block device, which cannot grow: the map keeps what the trailer lies over."""


class Flag(IntFlag):
    """Bits of ``flags``."""

    CLEAN = 1
    """Closed in good order: the log is empty."""
    FAILED = 2
    """A sync failed, so that nobody knows what of the acknowledged writes is on the disk."""
    UNCERTAIN = 4
    """The power failed at some time: the guest may have written more than the map says that it wrote."""

    ON_DEVICE = 8
    """Only of a trailer: it lies over the last bytes of a block device, and names its map."""

    REOPENED = 16
    """Who wrote was killed, and another has opened it since: a guest may have read what is not recorded."""
    COMMITTED = 32
    """Its guest's writes are in another disk now, which is the guest's: this one is of no use."""
    REDO = 64
    """A mirror's: a redo log lies beside the map, and has to be applied before the disk is looked at."""


_OF_MAP = Flag.CLEAN | Flag.FAILED | Flag.UNCERTAIN | Flag.REOPENED | Flag.COMMITTED | Flag.REDO
_OF_TRAILER = Flag.FAILED | Flag.ON_DEVICE


@dataclass(frozen=True, slots=True)
class Trailer:
    """What lies behind the data of a disk that is not complete."""

    size: int
    uuid: UUID
    flags: int = 0
    map: str = ""
    """On a device: the map's absolute path."""

    def pack(self) -> bytes:
        """Return the trailer as it lies in the file."""
        fixed = _sealed(_TRAILER.pack(TRAILER_MAGIC, VERSION, self.flags, self.size, self.uuid.bytes))
        if self.flags & Flag.ON_DEVICE:
            name = os.fsencode(self.map).ljust(MAX_MAP_PATH + 1, b"\0")
            fixed += _CRC.pack(crc32(name)) + name
        return fixed.ljust(TRAILER_BYTES, b"\0")


@dataclass(frozen=True, slots=True)
class Device:
    """The block device of a map: its size in bytes, and the path by which it was named."""

    size: int
    path: str


@dataclass(frozen=True, slots=True)
class Header:
    """The map's header."""

    size: int
    uuid: UUID
    boot: UUID
    generations: tuple[int, int] = (1, 2)
    flags: Flag = Flag.CLEAN
    backings: tuple[Backing, ...] = ()
    device: Device | None = None
    """What the data is on, if it is no file."""

    @property
    def grains(self) -> int:
        """Tell how many grains the disk has, the last one perhaps in part."""
        return -(-self.size // GRAIN)

    @property
    def chunks(self) -> int:
        """Tell how many entries the directory has."""
        return -(-self.grains // CHUNK_GRAINS)

    @property
    def bitmaps_at(self) -> int:
        """Tell where the bitmaps begin in the map, in bytes."""
        return -(-(DIRECTORY_AT + self.chunks * ENTRY_BYTES) // 4096) * 4096

    @property
    def kept_at(self) -> int:
        """Tell where the map keeps the bytes that the trailer on a device lies over."""
        return -(-self._tables_end // 4096) * 4096

    @property
    def map_bytes(self) -> int:
        """Return the length of the map."""
        return self.kept_at + TRAILER_BYTES if self.device else self._tables_end

    @property
    def _tables_end(self) -> int:
        return self.bitmaps_at + self.chunks * PAIR_BYTES

    def trailer(self, map_path: str) -> Trailer:
        """Return the trailer that belongs to this map."""
        if self.device is None:
            return Trailer(self.size, self.uuid)
        return Trailer(self.size, self.uuid, Flag.ON_DEVICE, map_path)

    def pack(self) -> bytes:
        """Return the header as it lies in the file."""
        names = self.pack_backings()
        fixed = _HEADER.pack(
            MAP_MAGIC,
            VERSION,
            Feature.ON_DEVICE if self.device else 0,
            self.size,
            GRAIN,
            self.flags,
            self.uuid.bytes,
            self.boot.bytes,
            *self.generations,
            len(names),
            crc32(names),
        )
        sealed = _sealed(fixed)
        if self.device:
            told = _DEVICE.pack(self.device.size, os.fsencode(self.device.path))
            sealed += _CRC.pack(crc32(told)) + told
        return sealed.ljust(SECTOR, b"\0")

    def pack_backings(self) -> bytes:
        """Return the backings as they lie in the file."""
        return b"".join(backing.name.encode() + b"\0" for backing in self.backings)


def trailer_at(size: int) -> int:
    """Tell where the trailer of a disk of ``size`` bytes is."""
    return -(-size // GRAIN) * GRAIN


def read_trailer(data: Storage, path: str) -> Trailer | None:
    """Return the trailer at a file's end, or None. Raises ImageError if it is damaged, OSError."""
    trailer = _trailer_at_end(data, path)
    if trailer is None:
        return None
    if trailer.flags & Flag.ON_DEVICE:
        raise ImageError(
            f"{path}: a copy of a block device on which an overlay is not complete: its map, {trailer.map}, "
            "belongs to the device; copy the device once that is complete"
        )
    if trailer_at(trailer.size) + TRAILER_BYTES != data.size():
        raise ImageError(
            f"{path}: the file has {data.size()} bytes, not those of a disk of {trailer.size} bytes and its "
            "trailer; it was cut off or has grown: make a new overlay"
        )
    return trailer


def read_device_trailer(device: Storage, path: str) -> Trailer | None:
    """Return the trailer that lies over the last bytes of a block device, or None; raises as read_trailer."""
    trailer = _trailer_at_end(device, path)
    if trailer is None:
        return None
    if not trailer.flags & Flag.ON_DEVICE:
        raise ImageError(
            f"{path}: a copy of an overlay's data file, not of a whole disk: its map belongs to that file; "
            "make a new overlay on the device (--force)"
        )
    if trailer.size > device.size():
        raise ImageError(
            f"{path}: by its trailer the disk has {trailer.size} bytes, and the device only {device.size()}; "
            "make a new overlay"
        )
    return trailer


def _trailer_at_end(data: Storage, path: str) -> Trailer | None:
    length = data.size()
    raw = data.read(length - TRAILER_BYTES, TRAILER_BYTES) if length >= TRAILER_BYTES else b""
    if raw[:8] != TRAILER_MAGIC:
        return None
    if not _is_sealed(raw, _TRAILER.size):
        raise ImageError(f"{path}: damaged trailer: its checksum is wrong; make a new overlay")
    _, version, flags, size, uuid = _TRAILER.unpack_from(raw)
    _check_version(version, flags & ~int(_OF_TRAILER), path)
    name = ""
    if flags & Flag.ON_DEVICE:
        if _CRC.unpack_from(raw, _MAP_AT - 4)[0] != crc32(raw[_MAP_AT:SECTOR]):
            raise ImageError(f"{path}: damaged trailer: the checksum of its map's path is wrong")
        name = os.fsdecode(raw[_MAP_AT:SECTOR].rstrip(b"\0"))
    return Trailer(size, UUID(bytes=uuid), flags, name)


def read_header(file: Storage, path: str) -> Header:
    """Return the map's header and backings. Raises ImageError if they are no good here, OSError."""
    raw = file.read(0, SECTOR)
    if raw[:8] != MAP_MAGIC:
        raise ImageError(
            f"{path}: not the map of a flat image: it does not begin with 'NBDFMAP' and a NUL; if the "
            "map is lost, move this away and make a new overlay (create --force)"
        )
    if len(raw) < SECTOR or not _is_sealed(raw, _HEADER.size):
        raise _damaged(path, "the header's checksum is wrong")
    _, version, features, size, grain, flags, uuid, boot, *generations, length, crc = _HEADER.unpack_from(raw)
    _check_version(version, flags & ~int(_OF_MAP), path)
    if unknown := features & ~int(Feature.ON_DEVICE):
        raise ImageError(
            f"{path}: the map has feature bits {unknown:#x}, unknown here; use the program that made it"
        )
    if grain != GRAIN:
        raise _damaged(path, f"its grain is {grain} bytes, not {GRAIN}")
    if not 0 < size <= MAX_SIZE or size % SECTOR:
        raise _damaged(path, f"a disk cannot have {size} bytes")
    names = file.read(BACKINGS_AT, length) if length <= MAX_BACKINGS else b""
    if len(names) != length or crc32(names) != crc:
        raise _damaged(path, "the checksum of the backings is wrong")
    backings = tuple(Backing(name.decode(), raw=True) for name in names.split(b"\0")[:-1])
    first, second = generations
    device = _read_device(raw, path) if features & Feature.ON_DEVICE else None
    header = Header(size, UUID(bytes=uuid), UUID(bytes=boot), (first, second), Flag(flags), backings, device)
    if file.size() < header.map_bytes:
        raise _damaged(path, f"it has {file.size()} bytes, {header.map_bytes} are needed")
    return header


def _read_device(raw: bytes, path: str) -> Device:
    if _CRC.unpack_from(raw, _DEVICE_AT - 4)[0] != crc32(raw[_DEVICE_AT:SECTOR]):
        raise _damaged(path, "the checksum of what it says of its device is wrong")
    size, name = _DEVICE.unpack_from(raw, _DEVICE_AT)
    return Device(size, os.fsdecode(name.rstrip(b"\0")))


def _sealed(fixed: bytes) -> bytes:
    return fixed + _CRC.pack(crc32(fixed))


def _is_sealed(raw: bytes, length: int) -> bool:
    return bool(_CRC.unpack_from(raw, length)[0] == crc32(raw[:length]))


def _check_version(version: int, unknown: int, path: str) -> None:
    if version != VERSION:
        raise ImageError(f"{path}: version {version} of the flat layout, unknown here; use a newer program")
    if unknown:
        raise ImageError(f"{path}: flags {unknown:#x}, unknown here; use the program that made it")


def _damaged(path: str, what: str) -> ImageError:
    return ImageError(f"{path}: damaged map: {what}; make a new overlay")
