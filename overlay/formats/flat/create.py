"""Making an empty flat image: a data file that is a hole and a trailer, and its map."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from nbdserve.common.errors import ImageError, UsageError
from nbdserve.common.ownership import Ownership
from overlay.formats.flat.header import (
    BACKINGS_AT,
    MAX_BACKINGS,
    MAX_SIZE,
    SECTOR,
    Header,
    Trailer,
    trailer_at,
)
from overlay.formats.flat.log import clear_log, current_boot
from overlay.formats.image import Backing
from overlay.formats.storage import Storage, create_file, sync_directory


def map_path(path: Path) -> Path:
    """Tell where the map of a data file is."""
    return path.with_name(path.name + ".map")


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

    Raises ImageError if a file exists, is in use or cannot be made, OSError if it cannot be written; then
    no new file is left behind.
    """
    beside = map_path(path)
    if not replace and beside.exists():
        raise ImageError(f"{beside}: the map of another image exists; choose another name, or --force")
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
        if not replace:
            for unfinished in made:
                unfinished.unlink()
        raise
    sync_directory(path.absolute().parent)


def write_trailer(data: Storage, header: Header) -> None:
    """Put a trailer behind a hole, durably."""
    place = trailer_at(header.size)
    trailer = Trailer(header.size, header.uuid).pack()
    data.truncate(place + len(trailer))
    data.write(place, trailer)
    data.sync()


def write_map(file: Storage, header: Header) -> None:
    """Write an empty map to an empty file, durably; the header last, as until then it is none."""
    file.truncate(header.map_bytes)
    clear_log(file)  # so that its space is taken now
    file.write(BACKINGS_AT, header.pack_backings())
    file.sync()
    file.write(0, header.pack())
    file.sync()
