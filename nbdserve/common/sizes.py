"""Sizes in bytes as operators write and read them: 512, 64K, 1.5G; binary units, like qemu-img's."""

from __future__ import annotations

import re
from fractions import Fraction

from nbdserve.common.errors import UsageError

_UNITS = "KMGTPE"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?:([kmgtpe])(?:i?b)?|b)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str, what: str) -> int:
    """Return bytes of ``512``, ``64K``, ``1.5G``, ``10GiB``; K is 1024 bytes.

    ``what`` names the option in the UsageError that anything else, or a fraction of a byte, raises.
    """
    match = _SIZE.fullmatch(text) if len(text) < 40 else None
    if match:
        factor = 1024 ** (_UNITS.index(match[2].upper()) + 1) if match[2] else 1
        size = Fraction(match[1]) * factor
        if size.denominator == 1:
            return int(size)
    raise UsageError(
        f"{what} {text!r} is not a size: write bytes, or a number with K, M, G, T, P or E, as in 10G"
    )


def format_size(size: int) -> str:
    """Return the size in the largest unit that keeps it at or above one: ``512 B``, ``1.5 GiB``."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, len(_UNITS))
    return f"{size / 1024**power:.4g} {_UNITS[power - 1]}iB"
