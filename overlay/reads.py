"""Reads as a server takes them: within its disk, in its blocks, none longer than it allows.

NBD protocol, "Block size constraints". A disk that does not end with a sector is continued with zeros, as
images have whole sectors.
"""

from __future__ import annotations

import errno
import threading
from concurrent.futures import Future

from nbdserve.client import Client

SECTOR = 512


def sectors(size: int) -> int:
    """A size in bytes, rounded up to whole sectors."""
    return -(-size // SECTOR) * SECTOR


def start_read(client: Client, offset: int, buffer: memoryview) -> Future[None]:
    """Fill ``buffer``, which must stay as it is until the Future is done; OSError if nobody is there."""
    export = client.export
    end = offset + len(buffer)
    block, longest = export.minimum_block or 1, export.maximum_block or len(buffer)
    if len(buffer) <= longest and end <= export.size and not offset % block and not end % block:
        return client.start_read(offset, buffer)
    begin, stop = offset - offset % block, min(-(-end // block) * block, export.size)
    return _Parts(client, offset, buffer, begin, stop, max(longest - longest % block, block)).future


class _Parts:
    """One read in several requests, or of more than was asked for."""

    def __init__(
        self, client: Client, offset: int, buffer: memoryview, begin: int, stop: int, longest: int
    ) -> None:
        """Ask for the bytes from ``begin`` to ``stop``, of which a part belongs into the buffer."""
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()
        self._buffer = buffer
        self._skipped = offset - begin
        self._data = memoryview(bytearray(max(0, stop - begin)))
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._missing = 1
        for place in range(0, len(self._data), longest):
            part = self._data[place : place + longest]
            try:
                started = client.start_read(begin + place, part)
            except OSError as error:
                self._error = error
                break
            with self._lock:
                self._missing += 1
            started.add_done_callback(self._came)
        self._came(None)

    def _came(self, part: Future[None] | None) -> None:
        """A request is over, or all have been sent."""
        with self._lock:
            self._missing -= 1
            if part is not None:
                self._error = self._error or part.exception()
            if self._missing:
                return
        if self._error is not None:
            number = self._error.errno if isinstance(self._error, OSError) else errno.EIO
            self.future.set_exception(
                OSError(number, getattr(self._error, "strerror", None) or str(self._error))
            )
            return
        data = self._data[self._skipped :][: len(self._buffer)]
        self._buffer[: len(data)] = data
        self._buffer[len(data) :] = bytes(len(self._buffer) - len(data))
        self.future.set_result(None)
