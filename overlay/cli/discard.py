"""``nbd-overlay discard``: remove an image of which nothing is lost, and no other.

It undoes ``create``, also one that was killed half-way, where nobody knows any more whose image that is. What
holds a guest's writes, or has cost a transfer, stays; so does what somebody uses.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from nbdserve.common.errors import ImageError
from overlay.formats.device.block_device import open_device
from overlay.formats.device.data import DeviceData
from overlay.formats.flat.create import SCHEME, map_path
from overlay.formats.flat.header import (
    BACKINGS_AT,
    SECTOR,
    Device,
    Header,
    read_device_trailer,
    read_header,
    read_trailer,
    trailer_at,
)
from overlay.formats.flat.open import Parts, place_of_map, remove_map
from overlay.formats.image import Image
from overlay.formats.open import open_image, real_path
from overlay.formats.storage import Storage, open_file, sync_directory


def discard(path: Path, *, copies: bool = False) -> bool:
    """Remove an image in which nothing is, and its map; False where there is none.

    With ``copies`` also one that holds what was copied, and nothing that a guest wrote. Raises ImageError
    when it is in use or holds anything else, OSError.
    """
    path = real_path(path)
    files = [each for each in (path, map_path(path)) if os.path.lexists(each)]
    with contextlib.ExitStack() as stack:
        # Nobody uses them, or begins to, until they are gone.
        opened = [open_file(each, writable=True) for each in files]
        for storage in opened:
            stack.callback(storage.close)
        if opened and not (_is_unfinished(path, opened) or _is_empty(path, copies)):
            raise _no_overlay(path, copies)
        for each in files:
            each.unlink()
        sync_directory(path.absolute().parent)
    return bool(files)


def discard_on_device(path: Path, map_file: Path | None = None, *, copies: bool = False) -> bool:
    """Put back what the trailer on a block device lies over, and remove the map; False where there is none.

    Raises ImageError as ``discard``, and where the map is missing.
    """
    with contextlib.ExitStack() as stack:
        # Nobody uses them, or begins to, until it is gone.
        device = open_device(path, writable=True)
        stack.callback(device.close)
        trailer = read_device_trailer(device, str(path))
        beside = place_of_map(path, device, map_file)
        if not os.path.lexists(beside):
            if trailer is None:
                return False
            raise ImageError(
                f"{path}: there is an overlay on it, whose map {beside} is missing: say where it is with "
                "--map; if it is lost, nbd-overlay create --force makes a new one"
            )
        file = open_file(beside, writable=True)
        stack.callback(file.close)
        header = None
        if trailer is not None:
            header = Header(trailer.size, trailer.uuid, trailer.uuid, device=Device(0, ""))
        if not _is_headless(file, header):
            _require_empty(path, beside, device, file, copies)
            # From now on this is what a killed create leaves, whatever ends it.
            file.write(0, bytes(SECTOR))
            file.sync()
        if header is not None:
            data = DeviceData(device, file, header.kept_at, header.size, is_whole=False)
            data.truncate(header.size)
            data.sync()
        remove_map(beside, file)
    return True


def _is_headless(file: Storage, header: Header | None) -> bool:
    """Whether this is a map whose header ``create`` has not written yet, of a disk with this trailer.

    What a trailer names may be anything: the last bytes of a complete disk are its guest's. So may what an
    operator names.
    """
    begin = file.read(0, BACKINGS_AT + len(SCHEME))
    if header is None and not begin:
        return True  # it was just about to be written
    is_as_long = header is None or file.size() == header.map_bytes
    return is_as_long and not any(begin[:BACKINGS_AT]) and begin[BACKINGS_AT:] == SCHEME


def _require_empty(path: Path, beside: Path, device: Storage, file: Storage, copies: bool) -> None:
    parts = Parts.of_device(device, file, str(path), str(beside))
    parts.check()
    with open_image(path, force_share=True, layout="flat", map_file=beside) as image:
        if parts.trailer is None or not _holds_nothing(image, copies):
            raise _no_overlay(path, copies)


def _is_unfinished(path: Path, files: Sequence[Storage]) -> bool:
    """Whether this is what ``create`` leaves when it is killed: a map without its header, no data at all."""
    data = files[0] if path.exists() else None
    if len(files) - (data is not None):
        with contextlib.suppress(ImageError):
            read_header(files[-1], str(map_path(path)))
            return False
    if data is None:
        return True
    trailer = read_trailer(data, str(path))
    return not any(data.data(0, trailer_at(trailer.size) if trailer else data.size()))


def _is_empty(path: Path, copies: bool) -> bool:
    """Whether this is an overlay that has all of its disk in the backing, or also there, with ``copies``."""
    if not path.exists():
        return False
    with open_image(path, force_share=True) as image:
        return _holds_nothing(image, copies)


def _holds_nothing(image: Image, copies: bool) -> bool:
    if image.is_committed:
        return True
    held = image.written_bytes if copies and image.records_writer else image.local_bytes
    return bool(image.backings) and held == 0


def _no_overlay(path: Path, copies: bool) -> ImageError:
    what = "overlay without a guest's writes" if copies else "empty overlay"
    return ImageError(f"{path}: it is no {what}: look at it (nbd-overlay info), nothing was removed")
