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
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

from nbdserve.common.errors import ImageError
from overlay.formats.device.block_device import open_device
from overlay.formats.device.data import DeviceData
from overlay.formats.device.map_place import default_map
from overlay.formats.flat.create import map_path
from overlay.formats.flat.grains import Grains
from overlay.formats.flat.header import (
    SECTOR,
    Flag,
    Header,
    Trailer,
    read_device_trailer,
    read_header,
    read_trailer,
    trailer_at,
)
from overlay.formats.flat.image import FlatImage
from overlay.formats.flat.leftover import Leftover
from overlay.formats.flat.log import current_boot
from overlay.formats.flat.map import sync_failed
from overlay.formats.flat.raw import RawImage
from overlay.formats.image import Image
from overlay.formats.storage import Storage, open_file, sync_directory


@dataclass(slots=True)
class Parts:
    """Data and map of an image, open, and what they say; ``path`` and ``map_path`` are for messages.

    data      the data file, or what a device and the map together hold in its place
    trailer   None: the data is complete
    file      the map; None where there is none
    """

    data: Storage
    trailer: Trailer | None
    path: str
    map_path: str
    file: Storage | None = None
    header: Header | None = None

    @classmethod
    def of_file(cls, data: Storage, file: Storage | None, path: str) -> Parts:
        """Read a data file and its map. Raises ImageError if one is damaged, or a device's; OSError."""
        beside = f"{path}.map"
        trailer = read_trailer(data, path)
        header = None if file is None else read_header(file, beside)
        if header is not None and header.device is not None:
            raise ImageError(f"{beside}: the map of an overlay on a block device, {header.device.path}")
        return cls(data, trailer, path, beside, file, header)

    @classmethod
    def of_device(cls, device: Storage, file: Storage | None, path: str, beside: str) -> Parts:
        """Read a block device, and its map. Raises ImageError as ``of_file``, and if the size changed."""
        trailer = read_device_trailer(device, path)
        if file is None:
            return cls(device, trailer, path, beside)
        header = read_header(file, beside)
        if header.device is None:
            raise ImageError(f"{beside}: the map of a data file, not of a block device")
        if header.device.size != device.size():
            raise ImageError(
                f"{path}: the device has {device.size()} bytes, and {header.device.size} when its map, "
                f"{beside}, was made: give it that size again; is it the right one?"
            )
        data = DeviceData(device, file, header.kept_at, header.size, is_whole=trailer is None)
        return cls(data, trailer, path, beside, file, header)

    def check(self) -> None:
        """Raises ImageError unless the two belong together, or the data is a whole disk."""
        if self.header is None:
            raw_size(self)
        elif self.trailer is None:
            self._check_finished(self.header)
        elif self.trailer.uuid != self.header.uuid or self.trailer.size != self.header.size:
            what = "data file" if self.header.device is None else "device"
            raise ImageError(
                f"{self.path}: the map {self.map_path} belongs to another {what}: put the right one "
                f"{'beside it' if self.header.device is None else 'there, or name it with --map'}"
            )

    def _check_finished(self, header: Header) -> None:
        """Raises ImageError unless data without a trailer can be the disk of the map."""
        assert self.file is not None
        right = (
            "put the right files beside each other" if header.device is None else "is it the right device?"
        )
        if self.data.size() != header.size:
            raise ImageError(
                f"{self.path}: the file has {self.data.size()} bytes, but by its map {self.map_path} it is "
                f"part of a disk of {header.size} bytes: it was cut off or replaced; {right}"
            )
        if Grains(self.file, header, self.map_path).present != header.grains:
            raise ImageError(
                f"{self.path}: the {'file' if header.device is None else 'device'} has lost its trailer, and "
                f"by its map {self.map_path} the disk is not complete: {right}"
            )

    def close(self) -> None:
        """Give the files back."""
        self.data.close()
        if self.file is not None:
            self.file.close()


def open_flat(
    path: Path,
    *,
    writable: bool = False,
    force_share: bool = False,
    map_file: Path | None = None,
    size: int | None = None,
) -> Image:
    """Open a flat image, or the raw disk that it has become, under QEMU's image locks.

    ``map_file`` is the map of a block device, if it is not where the device's trailer says; ``size`` that of
    the disk in bytes, where it may be on a larger device. Raises ImageError for whatever does not fit
    together, OSError.
    """
    parts = open_parts(path, writable=writable, force_share=force_share, map_file=map_file)
    try:
        beside, file = Path(parts.map_path), parts.file
        return assemble(
            parts,
            writable=writable,
            boot=current_boot(),
            remove_map=lambda: remove_map(beside, file),
            size=size,
        )
    except BaseException:
        parts.close()
        raise


def open_parts(
    path: Path, *, writable: bool = False, force_share: bool = False, map_file: Path | None = None
) -> Parts:
    """Open data and map, and read what they say of themselves. Raises ImageError, OSError."""
    is_device = path.is_block_device()
    opening = open_device if is_device else open_file
    data: Storage = opening(path, writable=writable, force_share=force_share)
    file: Storage | None = None
    try:
        beside = place_of_map(path, data, map_file) if is_device else map_path(path)
        if beside.is_symlink() or beside.exists():
            file = open_file(beside, writable=writable, force_share=force_share)
        if is_device:
            return Parts.of_device(data, file, str(path), str(beside))
        return Parts.of_file(data, file, str(path))
    except BaseException:
        data.close()
        if file is not None:
            file.close()
        raise


def place_of_map(path: Path, device: Storage, map_file: Path | None = None) -> Path:
    """Tell where the map of a device is: where it is said, where the trailer says, or by default."""
    if map_file is not None:
        return map_file
    trailer = read_device_trailer(device, str(path))
    return default_map(path) if trailer is None else Path(trailer.map)


def assemble(
    parts: Parts,
    *,
    writable: bool,
    boot: UUID,
    remove_map: Callable[[], None],
    size: int | None = None,
) -> Image:
    """Return what a data file, or a device, and a map, if there is one, make. Raises ImageError, OSError."""
    parts.check()
    data, header, trailer, path = parts.data, parts.header, parts.trailer, parts.path
    if size is not None and header is not None and header.size != size:
        raise ImageError(f"{path}: by its map the disk has {header.size} bytes, not {size}")
    if header is None or parts.file is None:
        return RawImage(data, raw_size(parts, size), path, writable=writable)
    if trailer is None:
        if not writable:
            parts.file.close()
            return RawImage(data, header.size, path, writable=False)
        data.sync()  # who took the trailer away may not have come so far
        leftover = Leftover(parts.file, remove_map, parts.map_path)
        leftover.remove()
        return RawImage(data, header.size, path, writable=True, leftover=leftover)
    if writable and (trailer.flags | header.flags) & Flag.FAILED:
        raise sync_failed(path)
    if writable and header.flags & Flag.COMMITTED:
        raise ImageError(
            f"{path}: what its guest wrote was committed to another disk, which is the guest's since, and "
            f"this one is of no use; nbd-overlay discard {path} removes it"
        )
    if writable and trailer.map and trailer.map != os.path.abspath(parts.map_path):
        moved = header.trailer(os.path.abspath(parts.map_path))
        data.write(trailer_at(header.size), moved.pack())
        data.sync()
    return FlatImage(
        data,
        parts.file,
        header,
        path,
        writable=writable,
        boot=boot,
        remove_map=remove_map,
        map_path=parts.map_path,
    )


def mark_committed(path: Path, map_file: Path | None = None) -> None:
    """Say in the map, durably, that what the guest wrote is in another disk: nobody writes to it any more.

    Raises ImageError where somebody uses it, or it is no overlay; OSError.
    """
    parts = open_parts(path, writable=True, map_file=map_file)
    try:
        parts.check()
        if parts.header is None or parts.file is None:
            raise ImageError(f"{path}: it is a complete disk, and no overlay any more")
        parts.file.write(0, replace(parts.header, flags=parts.header.flags | Flag.COMMITTED).pack())
        parts.file.sync()
    finally:
        parts.close()


def raw_size(parts: Parts, size: int | None = None) -> int:
    """Return the size of a disk that has no map: ``size``, if it is on a larger device.

    Raises ImageError unless it can be a whole one.
    """
    path = parts.path
    if parts.trailer is not None and parts.trailer.map:
        raise ImageError(
            f"{path}: not a whole disk, and its map {parts.map_path} is missing: put it back, or say where "
            "it is with --map"
        )
    if parts.trailer is not None:
        raise ImageError(
            f"{path}: not a whole disk, and its map {parts.map_path} is missing: put it back beside the file"
        )
    there = parts.data.size()
    if size is not None and size > there:
        raise ImageError(f"{path}: it has {there} bytes, too few for a disk of {size}")
    found = there if size is None else size
    if not found or found % SECTOR:
        raise ImageError(
            f"{path}: neither an overlay image nor a whole disk: it has {found} bytes, not a multiple of 512"
        )
    return found


def remove_map(beside: Path, file: Storage | None) -> None:
    """Remove the map of this name, if it is still this file: an operator may have put another there."""
    fd = None if file is None else file.fileno()
    with contextlib.suppress(FileNotFoundError):
        if fd is None or os.path.samestat(os.fstat(fd), os.stat(beside)):
            beside.unlink()
    sync_directory(beside.absolute().parent)
