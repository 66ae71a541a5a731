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
from overlay.formats.flat.create import map_path
from overlay.formats.flat.header import read_header, read_trailer, trailer_at
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
            what = "overlay without a guest's writes" if copies else "empty overlay"
            raise ImageError(f"{path}: it is no {what}: look at it (nbd-overlay info), nothing was removed")
        for each in files:
            each.unlink()
        sync_directory(path.absolute().parent)
    return bool(files)


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
        held = image.written_bytes if copies and image.records_writer else image.local_bytes
        return bool(image.backings) and held == 0
