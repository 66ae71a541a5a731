"""What an image looks like from its first bytes, where no format was given.

A raw image whose guest wrote the header of another format into it must never be opened as that format: the
header could name any file of the host as its backing. So a likeness is refused, not followed.
"""

from __future__ import annotations

import os
from pathlib import Path

from nbdserve.common.errors import ImageError

FORMATS = ("raw", "qcow2", "qcow", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels", "dmg", "bochs", "cloop")
"""QEMU's names of the formats that can be served."""

_SIGNATURES = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)
"""Offset in bytes, magic bytes, and QEMU's name of the format."""

_PROBED = 512


def looks_like(first: bytes) -> str | None:
    """Name the format whose magic bytes an image starts with, None for raw."""
    for offset, magic, name in _SIGNATURES:
        if first[offset : offset + len(magic)] == magic:
            return name
    return None


def require_raw(descriptor: int, path: Path, start: int = 0) -> None:
    """Raise ImageError if the opened image, from this offset in bytes on, looks like a format of its own."""
    found = looks_like(os.pread(descriptor, _PROBED, start))
    if found is not None:
        inside = f", or the disk in it with -f {found}" if found in FORMATS else ""
        raise ImageError(
            f"{path}: looks like a {found} image: serve the file's own bytes with -f raw{inside}"
        )
