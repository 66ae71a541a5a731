"""A seed: an older copy of the disk, a replica or a base image, which this host has already."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nbdserve.backends.holes import DataFinder
from nbdserve.backends.probe import looks_like
from nbdserve.common.errors import ImageError

_LOG = logging.getLogger("nbd-overlay")


class Seed:
    """A raw file or a block device, open for reading. Nothing is believed of it but what is read and hashed.

    So it may be shorter or longer than the disk, change while it is used, and have places that cannot be
    read. Safe for several threads.
    """

    def __init__(self, path: Path, *others: Path) -> None:
        """Open it. ImageError where it cannot be opened, is no raw disk, or is one of the other files."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise ImageError(f"{path}: the seed cannot be opened: {error.strerror}") from error
        try:
            self._check(*others)
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except BaseException:
            os.close(self._fd)
            raise
        self._finder = DataFinder()
        self._is_told = False

    def data(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of what is no hole in a range, in order; all of it where that cannot be told."""
        while offset < end:
            try:
                run = self._finder.find(self._fd, offset, end)
            except OSError:
                run = offset, end
            if run is None:
                return
            begin, stop = max(run[0], offset), run[1]
            offset = min(stop, end)
            yield begin, offset

    def read(self, offset: int, length: int) -> bytes | None:
        """Return a range; None where it cannot be read, or ends before."""
        try:
            data = os.pread(self._fd, length, offset)
        except OSError as error:
            if not self._is_told:
                self._is_told = True
                _LOG.warning("%s at %d: %s: what cannot be read is copied", self.path, offset, error.strerror)
            return None
        return data if len(data) == length else None

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)

    def _check(self, *others: Path) -> None:
        found = os.fstat(self._fd)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
            raise ImageError(f"{self.path}: a seed is a raw file or a block device")
        for other in others:
            try:
                if _is_same(found, os.stat(other)):
                    raise ImageError(f"{self.path}: the seed is the image itself, {other}; leave out --seed")
            except FileNotFoundError:
                continue
        try:
            first = os.pread(self._fd, 512, 0)
        except OSError:
            return  # what cannot be read is copied
        if kind := looks_like(first):
            raise ImageError(f"{self.path}: looks like a {kind} image; a seed must be raw (qemu-img convert)")


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether two are one file, or nodes of one device."""
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)
