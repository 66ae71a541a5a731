"""What the guest has changed at the source: a dirty bitmap of the disk that this overlay has."""

from __future__ import annotations

from nbdserve.client import Target
from nbdserve.common.errors import ImageError
from nbdserve.monitor import dirty_bitmap
from nbdserve.monitor.dirty_bitmap import Ranges
from overlay.backing.reads import sectors


def read_dirty_bitmap(uri: Target, name: str, size: int) -> Ranges:
    """Return the ranges of a disk of ``size`` bytes that the bitmap of this name says are dirty, in order.

    Raises ConnectError where the server cannot be asked for it, ImageError where its disk has another size,
    OSError when it does not answer.
    """
    told = dirty_bitmap.read_dirty_bitmap(uri, name)
    if sectors(told.size) != size:
        raise ImageError(f"{uri}: its disk has {told.size} bytes, not {size}: it is another one")
    return told.ranges
