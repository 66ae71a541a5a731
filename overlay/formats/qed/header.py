"""The header of a QED image (QEMU, docs/interop/qed_spec, "Header"). All its integers are little-endian.

byte  size
   0     4  magic, "QED\\0"
   4     4  cluster_size, in bytes: a power of two from 2^12 to 2^26
   8     4  table_size, of each L1 and L2 table, in clusters: 1, 2, 4, 8 or 16
  12     4  header_size, in clusters: where the regular clusters begin
  16     8  features: a program that does not know a bit must not open the image
  24     8  compat_features: unknown bits are ignored
  32     8  autoclear_features: unknown bits are cleared before the image is written to
  40     8  l1_table_offset, in bytes
  48     8  image_size, of the guest's disk, in bytes: a multiple of 512
  56     4  backing_filename_offset, in bytes from the start of the file
  60     4  backing_filename_size, in bytes; both only count with the feature BACKING_FILE
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields, replace
from enum import IntFlag

from nbdserve.common.errors import ImageError
from overlay.formats.image import Backing
from overlay.formats.storage import Storage

MAGIC = b"QED\0"
_LAYOUT = struct.Struct("<4sIIIQQQQQII")
HEADER_BYTES = _LAYOUT.size

ENTRY_BYTES = 8
"""An entry of a table: an offset in the file."""

SECTOR = 512
MIN_CLUSTER_SIZE, MAX_CLUSTER_SIZE = 1 << 12, 1 << 26
TABLE_SIZES = (1, 2, 4, 8, 16)

MAX_IMAGE_SIZE = (1 << 63) - (1 << 30)
"""Largest disk that QEMU's block layer handles, in bytes (BDRV_MAX_LENGTH)."""

MAX_BACKING_NAME = 4095
"""Longest backing name that QEMU reads, in bytes (measured on 7.2: 4096 is refused)."""


class Feature(IntFlag):
    """Bits of ``features`` (QED spec, "Feature bits")."""

    BACKING_FILE = 0x01
    NEED_CHECK = 0x02
    BACKING_FORMAT_NO_PROBE = 0x04


@dataclass(frozen=True, slots=True)
class Header:
    """The header's fields, in their order, as the spec names them; :meth:`parse` gives only valid ones."""

    cluster_size: int
    table_size: int
    header_size: int
    features: int
    compat_features: int
    autoclear_features: int
    l1_table_offset: int
    image_size: int
    backing_filename_offset: int
    backing_filename_size: int

    @property
    def table_bytes(self) -> int:
        """Return the length of an L1 or L2 table in bytes."""
        return self.table_size * self.cluster_size

    @property
    def table_entries(self) -> int:
        """Tell how many offsets a table holds (the spec's TABLE_NOFFSETS)."""
        return self.table_bytes // ENTRY_BYTES

    @property
    def clusters(self) -> int:
        """Tell how many clusters the guest's disk has, the last one perhaps in part."""
        return -(-self.image_size // self.cluster_size)

    @property
    def first_cluster(self) -> int:
        """Tell where in the file the regular clusters begin, in bytes."""
        return self.header_size * self.cluster_size

    @property
    def metadata_bytes(self) -> int:
        """Return the bytes of header and tables once every cluster is in the image."""
        tables = 1 + -(-self.clusters // self.table_entries)
        return self.first_cluster + tables * self.table_bytes

    @property
    def largest_image(self) -> int:
        """Return the largest disk that tables of this geometry can map, in bytes."""
        return min(self.table_entries * self.table_entries * self.cluster_size, MAX_IMAGE_SIZE)

    def is_cluster(self, offset: int, end: int, count: int = 1) -> bool:
        """Tell whether ``count`` clusters at ``offset`` are aligned, behind the header and before ``end``."""
        return (
            offset % self.cluster_size == 0
            and self.first_cluster <= offset
            and offset + count * self.cluster_size <= end
        )

    def without(self, *bits: Feature) -> Header:
        """Return the same header with feature bits cleared."""
        return replace(self, features=self.features & ~sum(bits))

    def without_backing(self) -> Header:
        """Return the same header for an image that has the whole disk."""
        header = self.without(Feature.BACKING_FILE, Feature.BACKING_FORMAT_NO_PROBE)
        return replace(header, backing_filename_offset=0, backing_filename_size=0)

    def pack(self) -> bytes:
        """Return the header as it lies in the file."""
        return _LAYOUT.pack(MAGIC, *(getattr(self, field.name) for field in fields(self)))

    @classmethod
    def parse(cls, data: bytes, file_size: int, path: str) -> Header:
        """Read the header from the beginning of a file of ``file_size`` bytes.

        Raises ImageError, which begins with ``path``, for whatever the spec forbids or the file cannot hold.
        """
        if data[: len(MAGIC)] != MAGIC:
            raise ImageError(
                f"{path}: not a QED image: it does not begin with 'QED' and a NUL; check the path"
            )
        if len(data) < HEADER_BYTES:
            raise _damaged(path, f"the file ends within the header, after {len(data)} bytes")
        _, *values = _LAYOUT.unpack_from(data)
        header = cls(*values)
        header._check(file_size, path)
        return header

    def _check(self, file_size: int, path: str) -> None:
        unknown = self.features & ~sum(Feature)
        if unknown:
            raise ImageError(
                f"{path}: the image has feature bits {unknown:#x}, unknown here; use the program that made it"
            )
        size = self.cluster_size
        if not MIN_CLUSTER_SIZE <= size <= MAX_CLUSTER_SIZE or size & (size - 1):
            raise _damaged(path, f"the cluster size is {size}, not a power of two from 4096 to 67108864")
        if self.table_size not in TABLE_SIZES:
            raise _damaged(path, f"the table size is {self.table_size} clusters, not 1, 2, 4, 8 or 16")
        if self.image_size % SECTOR:
            raise _damaged(path, f"the disk's size is {self.image_size}, not a multiple of 512")
        if self.image_size > self.largest_image:
            raise _damaged(
                path, f"the disk's size is {self.image_size}; its tables map {self.largest_image} at most"
            )
        if not self.header_size:
            raise _damaged(path, "the header's own size is 0 clusters")
        if not self.is_cluster(self.l1_table_offset, file_size - file_size % size, self.table_size):
            raise _damaged(
                path,
                f"the L1 table's {self.table_bytes} bytes at {self.l1_table_offset} are not whole clusters "
                f"between the end of the header ({self.first_cluster}) and of the file ({file_size})",
            )
        if self.features & Feature.BACKING_FILE:
            self._check_backing(path)

    def _check_backing(self, path: str) -> None:
        begin, length = self.backing_filename_offset, self.backing_filename_size
        if not 0 < length <= MAX_BACKING_NAME:
            raise _damaged(path, f"the backing name's length is {length}, not from 1 to {MAX_BACKING_NAME}")
        if begin < HEADER_BYTES or begin + length > self.first_cluster:
            raise _damaged(
                path,
                f"the backing name's bytes {begin} to {begin + length} are not between the header's fields "
                f"and the first cluster ({HEADER_BYTES} to {self.first_cluster})",
            )


def read_header(storage: Storage, path: str) -> tuple[Header, Backing | None]:
    """Read the header and the backing's name; ImageError if they are malformed, OSError if the file fails."""
    header = Header.parse(storage.read(0, HEADER_BYTES), storage.size(), path)
    if not header.features & Feature.BACKING_FILE:
        return header, None
    name = storage.read(header.backing_filename_offset, header.backing_filename_size)
    if b"\0" in name:
        raise _damaged(path, "the backing name holds a NUL")
    raw = bool(header.features & Feature.BACKING_FORMAT_NO_PROBE)
    return header, Backing(name.decode(errors="surrogateescape"), raw)


def write_header(storage: Storage, header: Header) -> None:
    """Replace the header's fields, durably, after all that was written before."""
    storage.sync()
    storage.write(0, header.pack())
    storage.sync()


def _damaged(path: str, what: str) -> ImageError:
    return ImageError(f"{path}: damaged QED header: {what}; make a new overlay, or restore this one")
