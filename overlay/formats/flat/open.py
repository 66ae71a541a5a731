"""Opening a flat image: data and map must belong together, or the disk be complete.

trailer  map      what it is
yes      yes      an image, if both have the same UUID and size
yes      no       refused: without the map nobody knows which parts are there
no       yes      an image that was being finished, if the map says that everything is there; else refused
no       no       a complete raw disk
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from nbdserve.common.errors import ImageError
from overlay.formats.flat.create import map_path
from overlay.formats.flat.grains import Grains
from overlay.formats.flat.header import SECTOR, Flag, Header, Trailer, read_header, read_trailer
from overlay.formats.flat.image import FlatImage
from overlay.formats.flat.leftover import Leftover
from overlay.formats.flat.log import current_boot
from overlay.formats.flat.map import sync_failed
from overlay.formats.flat.raw import RawImage
from overlay.formats.image import Image
from overlay.formats.storage import Storage, open_file, sync_directory


def open_flat(path: Path, *, writable: bool = False, force_share: bool = False) -> Image:
    """Open a flat image, or the raw disk that it has become, under QEMU's image locks.

    Raises ImageError for whatever does not fit together, OSError.
    """
    beside = map_path(path)
    data = open_file(path, writable=writable, force_share=force_share)
    file: Storage | None = None
    try:
        if beside.is_symlink() or beside.exists():
            file = open_file(beside, writable=writable, force_share=force_share)
        return assemble(
            data,
            file,
            str(path),
            writable=writable,
            boot=current_boot(),
            remove_map=lambda: _remove(beside, file),
        )
    except BaseException:
        data.close()
        if file is not None:
            file.close()
        raise


def assemble(
    data: Storage,
    file: Storage | None,
    path: str,
    *,
    writable: bool,
    boot: UUID,
    remove_map: Callable[[], None],
) -> Image:
    """Return what a data file and a map, if there is one, make. Raises ImageError, OSError."""
    trailer = read_trailer(data, path)
    if file is None:
        return RawImage(data, raw_size(data, trailer, path), path, writable=writable)
    header = read_header(file, f"{path}.map")
    if trailer is None:
        check_finished(data, file, header, path)
        if not writable:
            file.close()
            return RawImage(data, header.size, path, writable=False)
        data.sync()  # who cut the trailer off may not have come so far
        leftover = Leftover(file, remove_map, path)
        leftover.remove()
        return RawImage(data, header.size, path, writable=True, leftover=leftover)
    check_pair(trailer, header, path)
    if writable and (trailer.flags | header.flags) & Flag.FAILED:
        raise sync_failed(path)
    return FlatImage(data, file, header, path, writable=writable, boot=boot, remove_map=remove_map)


def check_pair(trailer: Trailer, header: Header, path: str) -> None:
    """Raises ImageError unless a data file and a map belong together."""
    if trailer.uuid != header.uuid or trailer.size != header.size:
        raise ImageError(
            f"{path}: the map {path}.map belongs to another data file: put the right one beside it"
        )


def check_finished(data: Storage, file: Storage, header: Header, path: str) -> None:
    """Raises ImageError unless a file without a trailer can be the disk of a map."""
    if data.size() != header.size:
        raise ImageError(
            f"{path}: the file has {data.size()} bytes, but by its map {path}.map it is part of a disk of "
            f"{header.size} bytes: it was cut off or replaced; put the right files beside each other"
        )
    if Grains(file, header, f"{path}.map").present != header.grains:
        raise ImageError(
            f"{path}: the file has lost its trailer, and by its map {path}.map the disk is not complete: "
            "put the right files beside each other"
        )


def raw_size(data: Storage, trailer: Trailer | None, path: str) -> int:
    """Return the size of a disk that has no map. Raises ImageError unless it can be a whole one."""
    if trailer is not None:
        raise ImageError(
            f"{path}: not a whole disk, and its map {path}.map is missing: put it back beside the file"
        )
    size = data.size()
    if not size or size % SECTOR:
        raise ImageError(
            f"{path}: neither an overlay image nor a whole disk: it has {size} bytes, not a multiple of 512"
        )
    return size


def _remove(beside: Path, file: Storage | None) -> None:
    """Remove the map of this name, if it is still this file: an operator may have put another there."""
    fd = None if file is None else file.fileno()
    with contextlib.suppress(FileNotFoundError):
        if fd is None or os.path.samestat(os.fstat(fd), os.stat(beside)):
            beside.unlink()
    sync_directory(beside.absolute().parent)
