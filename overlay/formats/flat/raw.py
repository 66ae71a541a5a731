"""A complete raw disk as an image: what a flat image is once it is finished, opened anew."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

from overlay.formats.flat.header import GRAIN
from overlay.formats.flat.leftover import Leftover
from overlay.formats.image import Buffer, Image, Run, State
from overlay.formats.storage import Storage


class RawImage(Image):
    """A raw disk. Everything is present; nothing is known of who wrote it."""

    cluster_size = GRAIN
    backings = ()

    def __init__(
        self, data: Storage, size: int, path: str, *, writable: bool, leftover: Leftover | None = None
    ) -> None:
        """Serve the whole of a storage, which the image closes in the end, as it does the map left over."""
        self.size = size
        self._data, self._path = data, path
        self._writable = writable
        self._leftover = leftover
        self._closed = False

    @property
    def local_bytes(self) -> int:
        """Return all of the disk."""
        return self.size

    @property
    def raw_fd(self) -> int | None:
        """Return the file."""
        return self._data.fileno()

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """Yield data and holes; see Image."""
        self._check_range(offset, length)
        end = offset + length
        for place, part in self._data.data(offset, length):
            if place > offset:
                yield Run(offset, place - offset, State.ZERO)
            yield Run(place, part, State.DATA, place)
            offset = place + part
        if offset < end:
            yield Run(offset, end - offset, State.ZERO)

    def is_local(self, offset: int, length: int) -> bool:
        """Say yes."""
        self._check_range(offset, length)
        return True

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer."""
        self._check_range(offset, len(buffer))
        self._data.read_into(offset, buffer)
        return True

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Store data."""
        self._check_change(offset, len(data))
        self._data.write(offset, data)
        return True

    def write(self, offset: int, data: Buffer) -> bool:
        """Store data."""
        return self.write_now(offset, data)

    def zero(self, offset: int, length: int) -> bool:
        """Punch a hole."""
        self._check_change(offset, length)
        if length:
            self._data.zero(offset, length)
        return True

    def fill(self, offset: int, data: Buffer, asked_at: int | None = None) -> int:
        """Nothing is absent."""
        self._check_change(offset, len(data))
        return 0

    def fill_zero(self, offset: int, length: int, asked_at: int | None = None) -> int:
        """Nothing is absent."""
        self._check_change(offset, length)
        return 0

    def log_writes(self) -> None:
        """Do nothing: what was written is in the file."""

    def commit(self) -> None:
        """Do nothing: what was written is in the file."""

    def flush(self) -> None:
        """Sync the file."""
        self._data.sync()

    def invalidate(self, ranges: Sequence[tuple[int, int]]) -> None:
        """There is no backing that it could be had from: EBUSY."""
        raise OSError(errno.EBUSY, "the disk is complete and has no backing any more", self._path)

    def finish(self) -> None:
        """It is finished."""

    def tidy(self) -> None:
        """Remove the map that is left over, if there is one."""
        if self._leftover is not None:
            self._leftover.remove()

    def share(self) -> None:
        """Give QEMU's image locks back."""
        self._data.share()

    def close(self) -> None:
        """Sync and close the file."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._writable:
                self._data.sync()
        finally:
            if self._leftover is not None:
                self._leftover.close()
            self._data.close()
