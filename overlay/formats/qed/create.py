"""Making an empty QED image: a header with the backing's name, and an L1 table of zeros."""

from __future__ import annotations

from pathlib import Path

from nbdserve.common.errors import ImageError, UsageError
from nbdserve.common.ownership import Ownership
from nbdserve.common.sizes import format_size
from overlay.formats.image import Backing
from overlay.formats.qed.header import (
    ENTRY_BYTES,
    HEADER_BYTES,
    MAX_BACKING_NAME,
    MAX_CLUSTER_SIZE,
    MIN_CLUSTER_SIZE,
    SECTOR,
    TABLE_SIZES,
    Feature,
    Header,
)
from overlay.formats.storage import create_file, sync_directory

DEFAULT_CLUSTER_SIZE = 64 * 1024
DEFAULT_TABLE_SIZE = 4
"""QEMU's defaults. The spec allows more than QEMU's code (measured on 7.2, see docs/overlay.md): a table size
of 1 is never opened; with 16 a large write corrupts an image of small clusters; and where the tables could
map 2^64 bytes no disk size is valid."""


def new_header(
    size: int,
    backing: Backing | None,
    cluster_size: int = DEFAULT_CLUSTER_SIZE,
    table_size: int = DEFAULT_TABLE_SIZE,
) -> Header:
    """Return the header of an empty image for a disk of ``size`` bytes, rounded up to sectors as by QEMU.

    Raises UsageError for sizes (bytes; the table's in clusters) that no image can have.
    """
    if not MIN_CLUSTER_SIZE <= cluster_size <= MAX_CLUSTER_SIZE or cluster_size & (cluster_size - 1):
        raise UsageError(f"a cluster size of {cluster_size} bytes is not a power of two from 4K to 64M")
    if table_size not in TABLE_SIZES[1:]:
        raise UsageError(
            f"a table size of {table_size} clusters is not one of those that QEMU opens: 2, 4, 8, 16"
        )
    entries = table_size * cluster_size // ENTRY_BYTES
    if entries * entries * cluster_size >= 1 << 64:
        raise UsageError(
            f"no QEMU opens images with clusters of {format_size(cluster_size)}; take smaller ones"
        )
    name = _encoded(backing) if backing else b""
    features = Feature.BACKING_FILE if backing else Feature(0)
    if backing and backing.raw:
        features |= Feature.BACKING_FORMAT_NO_PROBE
    header = Header(
        cluster_size=cluster_size,
        table_size=table_size,
        header_size=1,
        features=features,
        compat_features=0,
        autoclear_features=0,
        l1_table_offset=cluster_size,
        image_size=-(-size // SECTOR) * SECTOR,
        backing_filename_offset=HEADER_BYTES if name else 0,
        backing_filename_size=len(name),
    )
    if not 0 < header.image_size <= header.largest_image:
        raise UsageError(
            f"a disk of {size} bytes is impossible: with clusters of {format_size(cluster_size)} and tables "
            f"of {table_size} clusters it has from 512 bytes to {format_size(header.largest_image)}"
        )
    if len(name) > min(MAX_BACKING_NAME, cluster_size - HEADER_BYTES):
        raise UsageError(f"the backing's name has {len(name)} bytes, too many for the image's header")
    return header


def create(
    path: Path,
    header: Header,
    backing: Backing | None,
    *,
    replace: bool = False,
    whose: Ownership | None = None,
) -> None:
    """Write an empty image, ``whose`` it is to be, durably; with ``replace``, over a file that nobody uses.

    Raises ImageError if the file exists, is in use or cannot be made, OSError if it cannot be written; then
    no new file is left behind.
    """
    storage = create_file(path, replace=replace, whose=whose)
    try:
        # The header comes last: until then the file is not an image.
        storage.truncate(header.l1_table_offset + header.table_bytes)
        storage.sync()
        storage.write(0, header.pack() + (_encoded(backing) if backing else b""))
        storage.sync()
    except BaseException:
        if not replace:
            path.unlink()
        raise
    finally:
        storage.close()
    sync_directory(path.absolute().parent)


def _encoded(backing: Backing) -> bytes:
    name = backing.name.encode(errors="surrogateescape")
    if not name or b"\0" in name:
        raise ImageError(f"{backing.name!r} cannot be a backing's name")
    return name
