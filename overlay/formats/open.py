"""Opening an image of whichever layout a file has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from nbdserve.backends.probe import looks_like
from nbdserve.common.errors import ImageError
from overlay.formats.flat.create import map_path
from overlay.formats.flat.header import read_trailer
from overlay.formats.flat.open import open_flat
from overlay.formats.image import Image
from overlay.formats.qed.header import MAGIC as QED_MAGIC
from overlay.formats.qed.image import QedImage
from overlay.formats.storage import open_file

Layout = Literal["flat", "qed"]
LAYOUTS: tuple[Layout, ...] = ("flat", "qed")

LAYOUT_HELP = (
    "the image's layout (default: as the file looks; give it where guests are not trusted, as the guest of a "
    "complete flat image can write what looks like another format)"
)
"""What ``--layout`` means to all that read an image."""


def open_image(
    path: Path, *, writable: bool = False, force_share: bool = False, layout: Layout | None = None
) -> Image:
    """Open an image under QEMU's image locks; through a symbolic link, the file that it leads to.

    Without ``layout`` the file tells: one with a map or a trailer is flat, one that begins with QED's magic
    is QED, any other a complete raw disk, which is what becomes of a flat image. As a guest can write QED's
    magic to its disk, whoever knows the layout should give it. Raises ImageError, OSError.
    """
    path = real_path(path)
    if (layout or layout_of(path)) == "qed":
        return QedImage.open(path, writable=writable, force_share=force_share)
    return open_flat(path, writable=writable, force_share=force_share)


def real_path(path: Path) -> Path:
    """Return the file that a symbolic link leads to: a map lies beside that. Other paths stay as they are."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def layout_of(path: Path) -> Layout:
    """Return the layout of a file. Raises ImageError if it cannot be read, OSError."""
    storage = open_file(path, force_share=True)
    try:
        if os.path.lexists(map_path(path)) or read_trailer(storage, str(path)):
            return "flat"
        first = storage.read(0, 512)
        if first.startswith(QED_MAGIC):
            return "qed"
        if kind := looks_like(first):
            raise ImageError(
                f"{path}: looks like a {kind} image, not like an overlay: check the path; if it is a "
                "complete disk that happens to begin like that, say --layout flat"
            )
        return "flat"
    finally:
        storage.close()
