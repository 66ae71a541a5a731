"""The fence: a process that keeps every QEMU from opening images for writing, for as long as it lives.

    nbd-migrate fence READY IMAGE... [--free] [--away MIGRATION --to WHERE...]

makes the file READY when the fence stands; SIGTERM ends it. With ``--away`` the images are out of reach by
then, also for the time when nobody holds them any more (moving.py).

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
from dataclasses import dataclass
from pathlib import Path

from nbdserve.backends.imagelocks import EXCLUSIVE, ImageLocks, Permission
from nbdserve.common import program
from nbdserve.common.errors import ImageError, UsageError
from nbdserve.service.pid_file import PidFile
from recipes.fencing.moving import image_now, put_away


@dataclass(frozen=True)
class Departure:
    """Where a guest went: the migration's name, and for each image where that disk is now, in words."""

    migration: str
    to: tuple[str, ...]


def fence(
    images: Sequence[str], ready: Path, *, free: bool = False, departure: Departure | None = None
) -> int:
    """Hold the fence until SIGTERM or SIGINT.

    With ``free`` it refuses an image that somebody writes to already; with ``departure`` the images are put
    out of reach, and what fails in that is complained of. Raises ImageError if an image cannot be locked,
    OperatorError if ``ready`` is a living process's.
    """
    ended = {signal.SIGTERM, signal.SIGINT}
    # Blocked first, so that a signal that comes early is not lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, ended)
    with PidFile(ready) as pid_file:
        for image in images:
            _hold(str(image_now(image)), free=free)
        if departure:
            _put_away(images, departure)
        pid_file.publish()
        signal.sigwait(ended)
    return program.EXIT_DONE


def _put_away(images: Sequence[str], departure: Departure) -> None:
    for image, to in zip(images, departure.to, strict=True):
        try:
            put_away(image, departure.migration, to)
        except ImageError as error:
            program.complain("nbd-migrate", str(error))


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


def main(arguments: Sequence[str]) -> int:
    """Hold the fence that these words ask for; return an exit code."""
    parser = program.Parser(prog="nbd-migrate fence")
    parser.add_argument("ready", metavar="READY", type=Path)
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    parser.add_argument("--free", action="store_true")
    parser.add_argument("--away", metavar="MIGRATION")
    parser.add_argument("--to", metavar="WHERE", action="append", default=[])
    given = parser.parse_args(arguments)
    if len(given.to) != (len(given.images) if given.away else 0):
        raise UsageError("fence: --away takes a --to for each image")
    departure = Departure(given.away, tuple(given.to)) if given.away else None
    return fence(given.images, given.ready, free=given.free, departure=departure)


if __name__ == "__main__":
    sys.exit(program.run("nbd-migrate", lambda: main(sys.argv[1:])))
