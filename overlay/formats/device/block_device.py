"""A block device as a storage: it cannot grow, and need not read as zeros where it was discarded."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nbdserve.backends.holes import Mode, try_fallocate
from nbdserve.backends.imagelocks import EXCLUSIVE, READER, WRITER, Permission
from nbdserve.backends.opening import is_read_only_device, logical_sector
from nbdserve.common.errors import ImageError
from overlay.formats.storage import FileStorage, locked, open_descriptor


class BlockDevice(FileStorage):
    """A block device, with QEMU's image locks on its node.

    Who writes to it has also opened it exclusively: nobody can mount it meanwhile, make it part of a volume
    group, or open it exclusively, too. A QEMU does not, and is kept away by the image locks.
    """

    zero_step = 4 << 20  # where the device has no command for zeros they are written

    def size(self) -> int:
        """Return the size of the device in bytes."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    def sector(self) -> int:
        """Return the bytes of a logical sector."""
        return logical_sector(self._fd)

    def allocated(self) -> int:
        """Return all of it, as nobody tells what a thin volume occupies."""
        return self.size()

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the whole range: a device does not tell where it has none."""
        if length:
            yield offset, length

    def truncate(self, size: int) -> None:
        """Refuse: EINVAL."""
        raise OSError(errno.EINVAL, "a block device cannot be cut off", str(self.path))

    def _unmap(self, offset: int, length: int) -> bool:
        """Use what Linux promises to read as zeros afterwards, freed or not: never a mere discard."""
        return any(
            try_fallocate(self._fd, mode | Mode.KEEP_SIZE, offset, length)
            for mode in (Mode.PUNCH_HOLE, Mode.ZERO_RANGE)
        )


def open_device(path: Path, *, writable: bool = False, force_share: bool = False) -> BlockDevice:
    """Open a block device under QEMU's image locks, exclusively if ``writable``.

    Raises ImageError if it is none, in use, or read-only and to be ``writable``.
    """
    fd = open_descriptor(path, os.O_RDWR | os.O_EXCL if writable else os.O_RDONLY)
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{path}: no block device any more")
    # Linux opens a read-only device for writing, and then refuses the writes.
    if writable and is_read_only_device(fd):
        os.close(fd)
        raise ImageError(f"{path}: the device is read-only; make it writable, or take another")
    used, unshared = WRITER if writable else READER, Permission.NONE if force_share else EXCLUSIVE
    return BlockDevice(*locked(fd, path, used, unshared))


def device_size(path: Path) -> int | None:
    """Return the size of a block device in bytes; None for anything else."""
    if not path.is_block_device():
        return None
    device = open_device(path, force_share=True)
    try:
        return device.size()
    finally:
        device.close()
