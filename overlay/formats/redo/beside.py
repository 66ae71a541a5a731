"""The file of a redo log beside an image's map, and what becomes of it when the image is used as a disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from nbdserve.common.errors import ImageError
from nbdserve.common.ownership import PRIVATE
from overlay.formats.flat.image import FlatImage
from overlay.formats.image import Image
from overlay.formats.redo.chunks import PAGE, Point, read_header
from overlay.formats.redo.log import Batches, RedoLog, begin_log
from overlay.formats.storage import create_file, open_file, sync_directory

_LOG = logging.getLogger("nbd-overlay")


def redo_path(image: FlatImage) -> Path:
    """Tell where an image's redo log is: in the place of its map, ``.redo`` instead of ``.map``."""
    return Path(f"{image.map_path.removesuffix('.map')}.redo")


@contextmanager
def opened(image: FlatImage) -> Iterator[RedoLog]:
    """Open the log of a mirror, or make it, until the block ends; then the image holds what was in it.

    Raises ImageError if the image has been used for something else, or the log is not this image's; OSError.
    """
    path = redo_path(image)
    if not image.has_redo:
        if image.local_bytes:
            raise ImageError(
                f"{path.with_suffix('')}: it holds something, and is no mirror: make one with nbd-overlay "
                "create, over the disk that the mirrored guest began with"
            )
        with closing(create_file(path, replace=True, whose=PRIVATE)) as file:
            begin_log(file, image.size, image.uuid)
        sync_directory(path.absolute().parent)
        image.mark_redo(has_redo=True)
    _require_log(path)
    with (
        closing(open_file(path, writable=True)) as file,
        closing(RedoLog(file, image, image.uuid, str(path))) as log,
    ):
        yield log


def settle(image: FlatImage) -> Point:
    """Make a mirror's image an ordinary overlay: apply its log, and remove it. Raises as opened().

    Returns what the disk is.
    """
    path = redo_path(image)
    with opened(image) as log:
        point = log.point
    image.mark_redo(has_redo=False)
    path.unlink()
    sync_directory(path.absolute().parent)
    _LOG.warning("%s: the mirror of a guest's disk: %s", path.with_suffix(""), point_text(point))
    return point


def read_point(image: FlatImage) -> Point:
    """Return the point of a mirror's image, whether or not it is being served.

    Raises ImageError if there is no log, OSError.
    """
    path = redo_path(image)
    _require_log(path)
    with closing(open_file(path, force_share=True)) as file:
        header = read_header(file.read(0, PAGE), str(path))
        return Batches(file, header, image.size, str(path)).last()[1]


def point_of(image: Image) -> Point | None:
    """Return the point of an image that may be a mirror; None if it is none. Raises as read_point()."""
    return read_point(image) if isinstance(image, FlatImage) and image.has_redo else None


def point_text(point: Point) -> str:
    """Say what a mirror holds."""
    if not point.number:
        return "nothing has come yet: the disk is the backing's"
    when = datetime.fromtimestamp(point.nanoseconds / 1e9, UTC)
    return f"the disk as of {when:%Y-%m-%d %H:%M:%S} UTC, point {point.number}"


def _require_log(path: Path) -> None:
    if not os.path.lexists(path):
        raise ImageError(f"{path}: the redo log of this mirror is missing, without which it is no disk")
