"""Opening an image of whichever layout a file has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from nbdserve.backends.probe import looks_like
from nbdserve.common.errors import ImageError, UsageError
from overlay.formats.device.block_device import open_device
from overlay.formats.flat.create import map_path
from overlay.formats.flat.header import read_device_trailer, read_trailer
from overlay.formats.flat.image import FlatImage
from overlay.formats.flat.open import open_flat, place_of_map
from overlay.formats.image import Image
from overlay.formats.qed.header import MAGIC as QED_MAGIC
from overlay.formats.qed.image import QedImage
from overlay.formats.redo.beside import redo_path, settle
from overlay.formats.storage import open_file

Layout = Literal["flat", "qed"]
LAYOUTS: tuple[Layout, ...] = ("flat", "qed")

LAYOUT_HELP = (
    "the image's layout (default: as the file looks; give it where guests are not trusted, as the guest of a "
    "complete flat image can write what looks like another format)"
)
"""What ``--layout`` means to all that read an image."""


def open_image(
    path: Path,
    *,
    writable: bool = False,
    force_share: bool = False,
    layout: Layout | None = None,
    map_file: Path | None = None,
    size: int | None = None,
    receiving: bool = False,
) -> Image:
    """Open an image under QEMU's image locks; through a symbolic link, the file that it leads to.

    Without ``layout`` the file tells: one with a map or a trailer is flat, one that begins with QED's magic
    is QED, any other a complete raw disk, which is what becomes of a flat image. As a guest can write QED's
    magic to its disk, whoever knows the layout should give it. ``map_file`` and ``size`` are of an image on a
    block device, see open_flat(). A mirror's redo log is applied, and removed, before it is written to;
    who is ``receiving`` goes on with it. Raises ImageError, OSError.
    """
    image = _opened(
        real_path(path), writable, force_share=force_share, layout=layout, map_file=map_file, size=size
    )
    try:
        if isinstance(image, FlatImage) and image.has_redo and not receiving:
            _settle(image, writable=writable, force_share=force_share)
    except BaseException:
        image.close()
        raise
    return image


def _settle(image: FlatImage, *, writable: bool, force_share: bool) -> None:
    if writable:
        settle(image)
    elif not force_share:
        raise ImageError(
            f"{redo_path(image)}: a mirror's redo log, which is not applied yet; if nobody serves the "
            "mirror any more, nbd-overlay receive --finish applies it"
        )


def _opened(
    path: Path,
    writable: bool,
    *,
    force_share: bool,
    layout: Layout | None,
    map_file: Path | None,
    size: int | None,
) -> Image:
    if path.is_block_device():
        if layout == "qed":
            raise ImageError(f"{path}: a block device cannot hold a QED image, which grows; name a file")
        if layout is None:
            layout_of(path, map_file)
        return open_flat(path, writable=writable, force_share=force_share, map_file=map_file, size=size)
    if map_file is not None or size is not None:
        raise UsageError(f"{path}: --map and --size are for an image on a block device; this is none")
    if (layout or layout_of(path)) == "qed":
        return QedImage.open(path, writable=writable, force_share=force_share)
    return open_flat(path, writable=writable, force_share=force_share)


def real_path(path: Path) -> Path:
    """Return the file that a symbolic link leads to: a map lies beside that. Other paths stay as they are.

    So do those of block devices, as what the links lead to may be another one after the next boot.
    """
    return Path(os.path.realpath(path)) if path.is_symlink() and not path.is_block_device() else path


def layout_of(path: Path, map_file: Path | None = None) -> Layout:
    """Return the layout of a file or device. Raises ImageError if it cannot be read, OSError."""
    is_device = path.is_block_device()
    storage = (open_device if is_device else open_file)(path, force_share=True)
    try:
        beside = place_of_map(path, storage, map_file) if is_device else map_path(path)
        trailer = (read_device_trailer if is_device else read_trailer)(storage, str(path))
        if trailer or os.path.lexists(beside):
            return "flat"
        first = storage.read(0, 512)
        if first.startswith(QED_MAGIC) and not is_device:
            return "qed"
        if kind := looks_like(first):
            raise ImageError(
                f"{path}: looks like a {kind} image, not like an overlay: check the path; if it is a "
                "complete disk that happens to begin like that, say --layout flat"
            )
        return "flat"
    finally:
        storage.close()
