"""The fence: a process that keeps every QEMU from opening images for writing, for as long as it lives.

    nbd-migrate fence READY IMAGE... [--free]  makes the file READY when the fence stands; SIGTERM ends it

It must not stand before the source's QEMU has reported ``completed``. Measured on 7.2: when the switch-over
fails, the source takes its image back to go on with the guest; a fence refuses that, and QEMU aborts
(``Assertion `!(bs->open_flags & BDRV_O_INACTIVE)' failed``). Afterwards the fence makes ``cont`` fail there.

Who raises it: steps/cutover.py (``fence_source``, which also ends A's QEMU) once ``completed`` is seen, and
commands/finish.py where that had not come to pass. Step 6 takes it down, when A's image has been moved aside
or is left to the operator (steps/shut_down.py).
"""

from __future__ import annotations

import os
import signal
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from nbdserve.backends.imagelocks import EXCLUSIVE, ImageLocks, Permission
from nbdserve.common import program
from nbdserve.common.errors import ImageError
from nbdserve.service.pid_file import PidFile


def fence(images: Sequence[str], ready: Path, *, free: bool = False) -> int:
    """Hold the fence until SIGTERM or SIGINT.

    With ``free`` it refuses an image that somebody writes to already. Raises ImageError for that, or if an
    image cannot be locked, OperatorError if ``ready`` is a living process's.
    """
    ended = {signal.SIGTERM, signal.SIGINT}
    # Blocked first, so that a signal that comes early is not lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    with PidFile(ready) as pid_file:
        for image in images:
            _hold(image, free=free)
        pid_file.publish()
        signal.sigwait(ended)
    return program.EXIT_DONE


def _hold(image: str, *, free: bool) -> None:
    """Take the locks of an image; they last as long as its file descriptor, which is never closed."""
    # Without O_NONBLOCK a FIFO would be waited for.
    fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise ImageError(f"{image}: neither a file nor a block device, so it is no disk to fence")
    locks = ImageLocks(fd, image)
    if free:
        locks.hold(Permission.NONE, EXCLUSIVE)
    locks.fence()


if __name__ == "__main__":
    path, *words = sys.argv[1:]
    disks = [word for word in words if word != "--free"]
    sys.exit(program.run("nbd-migrate", lambda: fence(disks, Path(path), free="--free" in words)))
