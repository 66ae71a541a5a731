"""Making an empty flat image: a data file that is a hole and a trailer, or a device with one; and its map."""

from __future__ import annotations

import dataclasses
import os
from contextlib import closing, suppress
from enum import Enum
from pathlib import Path
from uuid import uuid4

from nbdserve.common.errors import ImageError, UsageError
from nbdserve.common.ownership import Ownership
from overlay.formats.device.block_device import BlockDevice, open_device
from overlay.formats.flat.header import (
    BACKINGS_AT,
    MAP_MAGIC,
    MAX_BACKINGS,
    MAX_DEVICE_PATH,
    MAX_MAP_PATH,
    MAX_SIZE,
    SECTOR,
    TRAILER_BYTES,
    Device,
    Header,
    read_device_trailer,
    trailer_at,
)
from overlay.formats.flat.log import clear_log, current_boot
from overlay.formats.image import Backing
from overlay.formats.storage import Storage, create_file, open_file, sync_directory

SCHEME = b"nbd"
"""What the backings in each map begin with."""

_LOOK = 1 << 20
"""Bytes at the beginning of a device in which file systems and partition tables show."""


def map_path(path: Path) -> Path:
    """Tell where the map of a data file is."""
    return path.parent / f"{path.name}.map"  # also for a directory without a name, which is refused later


def new_header(size: int, backings: tuple[Backing, ...]) -> Header:
    """Return the header of an empty image for a disk of ``size`` bytes, rounded up to whole sectors.

    Raises UsageError for what no image can have.
    """
    size = -(-size // SECTOR) * SECTOR
    if not 0 < size <= MAX_SIZE:
        raise UsageError(f"a disk of {size} bytes is impossible: a flat image has from 512 bytes to 1 PiB")
    header = Header(size, uuid4(), current_boot(), backings=backings)
    if not backings or not all(backing.name and "\0" not in backing.name for backing in backings):
        raise UsageError("a flat image needs a backing, and its name cannot be empty or hold a NUL")
    try:
        length = len(header.pack_backings())
    except UnicodeEncodeError as error:
        raise UsageError("the backing's name is not UTF-8") from error
    if length > MAX_BACKINGS:
        raise UsageError(f"the backings' names have {length} bytes, too many for the map")
    return header


def create(path: Path, header: Header, *, replace: bool = False, whose: Ownership | None = None) -> None:
    """Write an empty image and make it durable; with ``replace``, over files that nobody uses.

    ``whose`` the data file is to be; the map is for nobody but who makes it.

    Raises ImageError if a file exists, is in use or cannot be made, or where the map's place has a file that
    is no map, OSError if it cannot be written; then no new file is left behind.
    """
    beside = map_path(path)
    _require_place_of_map(beside, replace)
    there = {each for each in (path, beside) if each.exists()}
    made: list[Path] = []
    try:
        data = create_file(path, replace=replace, whose=whose)
        made.append(path)
        try:
            file = create_file(beside, replace=replace)
            made.append(beside)
            try:
                # The trailer comes first: from then on nobody takes the data file for a whole disk.
                write_trailer(data, header)
                write_map(file, header)
            finally:
                file.close()
        finally:
            data.close()
    except BaseException:
        for unfinished in made:
            if unfinished not in there:
                unfinished.unlink()
        raise
    sync_directory(path.absolute().parent)


def _begins_like_map(file: Storage) -> bool:
    """Whether a file is a map, or the beginning of one: with its header, or its backings behind none."""
    begin = file.read(0, BACKINGS_AT + len(SCHEME))
    return not begin or begin.startswith(MAP_MAGIC) or begin[BACKINGS_AT:] == SCHEME


def _require_place_of_map(beside: Path, replace: bool) -> None:
    """Raise ImageError where a map cannot be made: no other file is overwritten, whatever its name."""
    if not os.path.lexists(beside):
        return
    if not replace:
        raise ImageError(f"{beside}: the map of another image exists; choose another name, or --force")
    with closing(open_file(beside)) as file:
        if not _begins_like_map(file):
            raise ImageError(
                f"{beside}: the image's map comes there, and this file is no map, which --force leaves "
                "alone: move it away, or choose another name"
            )


def write_trailer(data: Storage, header: Header) -> None:
    """Put a trailer behind a hole, durably."""
    place = trailer_at(header.size)
    trailer = header.trailer("").pack()
    data.truncate(place + len(trailer))
    data.write(place, trailer)
    data.sync()


def write_map(file: Storage, header: Header) -> None:
    """Write an empty map to an empty file, durably; the header last, as until then it is none."""
    write_map_body(file, header)
    write_map_header(file, header)


def write_map_body(file: Storage, header: Header, kept: bytes = b"") -> None:
    """Write all of an empty map but its header, durably; ``kept`` is what a device's trailer replaces."""
    file.write(BACKINGS_AT, header.pack_backings())  # by which discard knows a map without its header
    file.truncate(header.map_bytes)
    clear_log(file)  # so that its space is taken now
    if kept:
        file.write(header.kept_at, kept)
    file.sync()


def write_map_header(file: Storage, header: Header) -> None:
    """From now on it is a map, durably."""
    file.write(0, header.pack())
    file.sync()


def create_on_device(path: Path, header: Header, beside: Path, *, replace_old: bool = False) -> None:
    """Make an empty image on a block device, whose map is the new file ``beside``, an absolute path.

    With ``replace_old`` also where something is on the device already, or a map in the file. Raises
    ImageError when that is not to be overwritten, when the device is in use or too small, OSError; then no
    new map is left behind, and the device is as it was.
    """
    _require_place_of_map(beside, replace_old)
    device = open_device(path, writable=True)
    try:
        held = examine(device, path, header.size, beside)
        if held is not Held.NOTHING and not replace_old:
            raise ImageError(f"{path}: there is {held.value} on it; --force overwrites it")
        kept = kept_page(device, str(path))
        there, name = device.size(), os.fsencode(os.path.abspath(path))[:MAX_DEVICE_PATH]
        header = dataclasses.replace(header, device=Device(there, os.fsdecode(name)))
        beside.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_on_device(device, header, beside, kept or bytes(TRAILER_BYTES), replace_old=replace_old)
    finally:
        device.close()
    sync_directory(beside.parent)


class Held(Enum):
    """What is on a device that an image would overwrite."""

    NOTHING = "nothing"
    SOMETHING = "something"
    OVERLAY = "an overlay that is not complete"


def examine(device: BlockDevice, path: Path, size: int, beside: Path) -> Held:
    """Look at what is on a device, as far as that shows; ImageError where it can have no disk of ``size``."""
    if len(os.fsencode(beside)) > MAX_MAP_PATH:
        raise ImageError(
            f"{beside}: the path of a device's map has at most {MAX_MAP_PATH} bytes; choose another"
        )
    there, sector = device.size(), device.sector()
    if there < max(size, TRAILER_BYTES):
        raise ImageError(f"{path}: it has {there} bytes, too few for a disk of {size}; take a larger one")
    if size % sector:
        raise ImageError(
            f"{path}: it has sectors of {sector} bytes, and a disk of {size} is no multiple of that; take "
            "another"
        )
    kept = kept_page(device, str(path))
    if kept is None:
        return Held.OVERLAY
    return Held.SOMETHING if any(kept) or any(device.read(0, _LOOK)) else Held.NOTHING


def kept_page(device: Storage, path: str) -> bytes | None:
    """Return the last bytes of a device, in whose place a trailer comes; None where there is one already."""
    try:
        if read_device_trailer(device, path) is not None:
            return None
    except ImageError:
        pass  # it is overwritten, or refused as something
    return device.read(device.size() - TRAILER_BYTES, TRAILER_BYTES)


def write_on_device(device: Storage, file: Storage, header: Header, beside: str, kept: bytes) -> None:
    """Write an empty map and the trailer, durably: the page that this replaces is safe before."""
    assert header.device is not None
    write_map_body(file, header, kept)
    try:
        device.write(header.device.size - TRAILER_BYTES, header.trailer(beside).pack())
        device.sync()
        write_map_header(file, header)
    except BaseException:
        with suppress(OSError):
            device.write(header.device.size - TRAILER_BYTES, kept)
            device.sync()
        raise


def _write_on_device(
    device: Storage, header: Header, beside: Path, kept: bytes, *, replace_old: bool
) -> None:
    was_there = beside.exists()
    file = create_file(beside, replace=replace_old)
    try:
        try:
            write_on_device(device, file, header, str(beside), kept)
        finally:
            file.close()
    except BaseException:
        if not was_there:
            beside.unlink()
        raise
