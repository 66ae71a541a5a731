"""Reads as a server takes them: within its disk, in its blocks, as long as it allows and its pace says.

NBD protocol, "Block size constraints". A disk that does not end with a sector is continued with zeros, as
images have whole sectors.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from concurrent.futures import Future
from functools import partial

from nbdserve.client import Client
from nbdserve.client.pace import Pace, timed

SECTOR = 512
LONGEST = 1 << 20
"""Bytes of one request to a server, at most."""
_SHORTEST, _FIRST = 16 << 10, 64 << 10
"""The same on the slowest link, and before anything is known of it."""

Range = tuple[int, int]
"""Where something begins and ends in a buffer."""


def sectors(size: int) -> int:
    """Return a size in bytes, rounded up to whole sectors."""
    return -(-size // SECTOR) * SECTOR


def new_pace() -> Pace:
    """Tell how long the reads from one server are, in bytes."""
    return Pace(_SHORTEST, _FIRST, LONGEST)


class Reading:
    """One read into a buffer, which must stay as it is meanwhile.

    What came before a connection was lost is not asked for again when it is started on another.
    """

    def __init__(self, offset: int, buffer: memoryview) -> None:
        self.offset = offset
        self.buffer = buffer
        self._whole: Range = (0, len(buffer))
        self._missing = [self._whole]
        self._single: Future[None] | None = None
        """The one request that asks for all of it, if there is but one."""

    @property
    def bytes_missing(self) -> int:
        """Tell how much has not come yet, while nothing is under way."""
        single = self._single
        if single is not None and single.done() and single.exception() is None:
            return 0
        return sum(end - begin for begin, end in self._missing)

    def start(self, client: Client, pace: Pace) -> Future[None]:
        """Ask for what is missing; the Future ends with an OSError if not all of it comes."""
        if self._missing == [self._whole] and self._fits(client, pace):
            try:
                self._single = timed(client.start_read, pace, len(self.buffer))(self.offset, self.buffer)
            except OSError as error:
                self._single = Future()
                self._single.set_exception(error)
            return self._single
        attempt = _Attempt(self, self._missing, client, pace)
        attempt.go_on()
        return attempt.future

    def left(self, missing: list[Range]) -> None:
        """An attempt has ended, and this did not come."""
        self._missing = missing

    def _fits(self, client: Client, pace: Pace) -> bool:
        """Whether one request brings all of it, to where it belongs."""
        length, export = len(self.buffer), client.export
        block = export.minimum_block
        if block > 1 and (self.offset % block or length % block):
            return False
        return 0 < length <= export.payload(pace.length) and self.offset + length <= export.size


class _Attempt:
    """What is missing of a read, asked for on one connection, no more at a time than its pace says."""

    def __init__(self, reading: Reading, missing: list[Range], client: Client, pace: Pace) -> None:
        self.future: Future[None] = Future()
        self.future.set_running_or_notify_cancel()
        self._reading, self._client, self._pace = reading, client, pace
        self._export = client.export
        self._block = client.export.minimum_block or 1
        self._lock = threading.Lock()
        self._waiting = deque(part for part in missing if part[1] > part[0])
        self._failed: list[Range] = []
        self._bytes = 0
        """That are under way."""
        self._error: BaseException | None = None
        self._is_over = False

    def go_on(self) -> None:
        """Ask for more, or end if there is no more to ask for."""
        while (part := self._next()) is not None:
            try:
                start, target, future = self._ask(part)
            except (OSError, MemoryError) as error:
                self._came(part, error)
            else:
                future.add_done_callback(partial(self._answered, part, start, target))

    def _next(self) -> Range | None:
        """What to ask for now, if anything. Ends the attempt when all is over."""
        with self._lock:
            if self._waiting and self._error is None and self._bytes < self._pace.room:
                begin, end = self._waiting.popleft()
                longest = self._export.payload(self._pace.length)
                stop = begin + self._export.piece(self._reading.offset + begin, end - begin, longest)
                if stop < end:
                    self._waiting.appendleft((stop, end))
                self._bytes += stop - begin
                return begin, stop
            is_over = not self._bytes and not self._is_over
            self._is_over |= is_over
        if is_over:
            self._end()
        return None

    def _ask(self, part: Range) -> tuple[int, memoryview, Future[None]]:
        """Read a part; returns where what is read begins on the disk and where it will be.

        That is other memory where the server's blocks do not end as the part does, or its disk ends before.
        """
        begin, end = self._reading.offset + part[0], self._reading.offset + part[1]
        start = begin - begin % self._block
        stop = max(start, min(-(-end // self._block) * self._block, self._client.size))
        target = self._reading.buffer[part[0] : part[1]]
        if (start, stop) != (begin, end):
            target = memoryview(bytearray(stop - start))
        if target:
            return start, target, timed(self._client.start_read, self._pace, len(target))(start, target)
        nothing: Future[None] = Future()
        nothing.set_result(None)
        return start, target, nothing

    def _answered(self, part: Range, start: int, target: memoryview, future: Future[None]) -> None:
        error = future.exception()
        try:
            if error is None:
                self._take(part, start, target)
        except Exception as trouble:  # noqa: BLE001 - whoever waits for the read is told
            error = trouble
        self._came(part, error)
        self.go_on()

    def _take(self, part: Range, start: int, target: memoryview) -> None:
        """Copy what was read into other memory to where it belongs; behind the server's disk are zeros."""
        begin, end = part
        buffer = self._reading.buffer
        if target.obj is not buffer.obj:
            data = target[self._reading.offset + begin - start :][: end - begin]
            buffer[begin : begin + len(data)] = data
            buffer[begin + len(data) : end] = bytes(end - begin - len(data))

    def _came(self, part: Range, error: BaseException | None) -> None:
        with self._lock:
            self._bytes -= part[1] - part[0]
            if error is not None:
                self._failed.append(part)
                self._error = self._error or error

    def _end(self) -> None:
        self._reading.left([*self._failed, *self._waiting])
        error = self._error
        if error is None:
            self.future.set_result(None)
        elif isinstance(error, OSError):
            self.future.set_exception(error)
        else:
            self.future.set_exception(OSError(errno.ENOMEM, f"{self._client.uri}: {error!r}"))
