"""What a block device and a map hold of a disk, as a data file that ends with a trailer.

A device may be exactly as large as the disk, so the trailer lies over its last 4096 bytes, the *page*, and
the map keeps what belongs there: the end of the disk, as far as the disk reaches, and what the device held
behind it. ``truncate`` puts the page back. The trailer says what it is within its first sector, which is
written last, when the rest of the page is durable: who finds no trailer finds the whole page.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from threading import Lock

from overlay.formats.storage import Storage

PAGE = 4096
_SECTOR = 512


class DeviceData:
    """A storage of a disk's bytes, and behind them, from the next multiple of 4096 on, the trailer.

    ``_lock`` is for what of the page is the disk's: reads and writes there wait for each other, and once, for
    ``truncate``, for a sync.
    """

    def __init__(self, device: Storage, file: Storage, kept_at: int, size: int, *, is_whole: bool) -> None:
        """``file`` is the map, which keeps the page at ``kept_at``; ``size`` that of the disk, in bytes.

        ``is_whole``: the page is in its place already, and there is no trailer.
        """
        self.zero_step = device.zero_step
        self._device, self._file, self._kept_at, self._disk = device, file, kept_at, size
        self._page_at = device.size() - PAGE
        self._cut = min(self._page_at, size)
        self._trailer_at = -(-size // PAGE) * PAGE
        self._lock = Lock()
        self._is_whole = is_whole
        self._changes = 0
        """Of the page, in the map."""
        self._synced = 0

    def size(self) -> int:
        """Return the bytes of the disk, or where the trailer ends."""
        return self._disk if self._is_whole else self._trailer_at + PAGE

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes, fewer only at the end."""
        length = max(0, min(length, self.size() - offset))
        data = bytearray(length)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer; EIO if the storage ends before."""
        end = offset + len(buffer)
        if end <= self._cut:
            self._device.read_into(offset, buffer)
            return
        if end > self.size():
            raise OSError(errno.EIO, f"the disk ends at {self._disk}, within the data")
        if offset < self._cut:
            self._device.read_into(offset, buffer[: self._cut - offset])
            buffer, offset = buffer[self._cut - offset :], self._cut
        with self._lock:
            for storage, place, begin, stop in self._pieces(offset, end):
                storage.read_into(place, buffer[begin:stop])

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of the data, which must not reach beyond the trailer."""
        end = offset + len(data)
        if end <= self._cut:
            self._device.write(offset, data)
            return
        view = memoryview(data).cast("B")
        if offset < self._cut:
            self._device.write(offset, view[: self._cut - offset])
            view, offset = view[self._cut - offset :], self._cut
        with self._lock:
            for storage, place, begin, stop in self._pieces(offset, end):
                storage.write(place, view[begin:stop])
                if storage is self._file:
                    self._changes += 1

    def zero(self, offset: int, length: int) -> None:
        """Make a range of the disk read as zeros."""
        before = max(0, min(length, self._cut - offset))
        if before:
            self._device.zero(offset, before)
        if before < length:
            self.write(offset + before, bytes(length - before))

    def data(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield what is not surely a hole; the page never is."""
        before = max(0, min(length, self._cut - offset))
        yield from self._device.data(offset, before)
        if before < length:
            yield offset + before, length - before

    def truncate(self, size: int) -> None:
        """Put the page back in its place, so that the device is the disk; ``size`` can only be the disk's.

        It is durable after the next sync.
        """
        if size != self._disk:
            raise OSError(errno.EINVAL, f"a disk of {self._disk} bytes on a device cannot be cut at {size}")
        if self._is_whole:
            return
        # Nobody waits for this sync, unless somebody writes to the page meanwhile.
        changes = self._changes
        self._put_back(_SECTOR, PAGE)
        self._device.sync()
        with self._lock:
            if changes != self._changes:
                self._put_back(_SECTOR, PAGE)
                self._device.sync()
            self._put_back(0, _SECTOR)
            self._is_whole = True

    def sync(self) -> None:
        """Return when everything is durable, what the map keeps of the disk, too."""
        changes = self._changes
        if changes != self._synced and not self._is_whole:
            self._file.sync()
            self._synced = changes
        self._device.sync()

    def fileno(self) -> int | None:
        """Return the device's descriptor."""
        return self._device.fileno()

    def share(self) -> None:
        """Give the locks back."""
        self._device.share()

    def close(self) -> None:
        """Free the device; the map is not ours."""
        self._device.close()

    def _put_back(self, begin: int, end: int) -> None:
        kept = self._file.read(self._kept_at + begin, end - begin)
        if len(kept) < end - begin:
            raise OSError(errno.EIO, "the map ends before what it keeps of the device")
        self._device.write(self._page_at + begin, kept)

    def _pieces(self, offset: int, end: int) -> Iterator[tuple[Storage, int, int, int]]:
        """Where a range behind the cut is: storage, place there, and the part of it from begin to stop."""
        stop = min(end, self._disk)
        if offset < stop:
            behind = offset - self._page_at
            kept = (self._device, offset) if self._is_whole else (self._file, self._kept_at + behind)
            yield *kept, 0, stop - offset
        if end > self._trailer_at and not self._is_whole:
            begin = max(offset, self._trailer_at)
            yield self._device, self._page_at + begin - self._trailer_at, begin - offset, end - offset
