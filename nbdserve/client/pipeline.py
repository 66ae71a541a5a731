"""One connection to an export, with many requests in flight.

Whoever starts a request sends it, as far as the socket takes it, and gets a Future. One thread for each
connection receives the replies and completes the Futures, also when the server dies or falls silent: no
Future stays open for longer than the time limit.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from nbdserve.client.handle import (
    Completion,
    ErrorCell,
    Export,
    Handle,
    HandleError,
    drive,
    drive_once,
    is_over,
    needs_waking,
    open_handle,
)
from nbdserve.protocol.constants import CommandFlags
from nbdserve.protocol.extents import Extent
from nbdserve.protocol.offers import BASE_ALLOCATION
from nbdserve.threads import Thread
from nbdserve.uri import NbdUri

DEFAULT_TIMEOUT = 10.0
"""Seconds that connecting, or one request, may take."""

STATUS_LIMIT = 1 << 30
"""Longest block status request in bytes: short enough that a slow server answers it within the time limit."""

_READ_PART = 1 << 20
_READS_AT_ONCE = 4
"""How ``Client.read`` cuts up long ranges, in bytes and requests."""

_CLOSE_TIMEOUT = 1.0

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


def connect(
    uri: NbdUri,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    request_timeout: float | None = None,
    contexts: Sequence[str] | None = (BASE_ALLOCATION,),
    block_sizes: bool = True,
) -> Client:
    """Connect to an export; ``timeout`` seconds for that, and for each later request unless it has its own.

    ``contexts`` are the meta contexts to ask for, None for all that the server lists; ``block_sizes`` says
    whether to ask for the server's constraints on requests. Raises ConnectError when nobody answers there in
    time, or refuses the export.
    """
    handle, export = open_handle(uri, contexts, block_sizes, timeout)
    return Client(uri, export, handle, timeout if request_timeout is None else request_timeout)


class _Request(Generic[T]):
    """A request in flight. ``result`` yields what its Future is to return, once it has succeeded."""

    def __init__(self, deadline: float, result: Callable[[], T]) -> None:
        self.future: Future[T] = Future()
        # It is on its way: nobody can call it back.
        self.future.set_running_or_notify_cancel()
        self.deadline = deadline
        self.result = result

    def succeed(self) -> None:
        try:
            self.future.set_result(self.result())
        except OSError as error:
            self.future.set_exception(error)


class Client:
    """One connection to an export, made by :func:`connect`.

    Futures end with an OSError: ENOTCONN when the connection is lost, ETIMEDOUT when an answer is late, which
    ends the connection too, else what the server says. Their callbacks run in the connection's own thread and
    must not wait.
    """

    def __init__(self, uri: NbdUri, export: Export, handle: Handle, timeout: float) -> None:
        self.uri = uri
        self.export = export
        self._timeout = timeout
        self._lock = threading.Lock()
        self._handle: Handle | None = handle
        self._thread: Thread | None = None
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        # In the order of their deadlines, as all have the same time. libnbd's callbacks touch neither this
        # nor the lock, as they run with libnbd's own lock held; they only append to _over.
        self._in_flight: dict[_Request[Any], None] = {}
        self._over: deque[tuple[_Request[Any], int]] = deque()

    @property
    def size(self) -> int:
        """Size of the export in bytes."""
        return self.export.size

    @property
    def connected(self) -> bool:
        """Whether the connection still stands, as far as is known."""
        return self._handle is not None

    def start_read(self, offset: int, buffer: memoryview) -> Future[None]:
        """Fill ``buffer``, which must stay as it is until the Future is done."""
        self._check_range(offset, len(buffer))
        return self._start(lambda handle, over: handle.aio_pread(buffer, offset, over))

    def start_write(self, offset: int, data: Buffer, flags: CommandFlags) -> Future[None]:
        """Write all of ``data``, which must stay as it is until the Future is done."""
        self._check_range(offset, len(data))
        return self._start(lambda handle, over: handle.aio_pwrite(data, offset, over, int(flags)))

    def start_zero(self, offset: int, length: int, flags: CommandFlags) -> Future[None]:
        """Make a range read as zeroes."""
        self._check_range(offset, length)
        return self._start(lambda handle, over: handle.aio_zero(length, offset, over, int(flags)))

    def start_trim(self, offset: int, length: int, flags: CommandFlags) -> Future[None]:
        """Give a range back."""
        self._check_range(offset, length)
        return self._start(lambda handle, over: handle.aio_trim(length, offset, over, int(flags)))

    def start_cache(self, offset: int, length: int) -> Future[None]:
        """Let the server bring a range closer."""
        self._check_range(offset, length)
        return self._start(lambda handle, over: handle.aio_cache(length, offset, over))

    def start_flush(self) -> Future[None]:
        """Make durable what has been acknowledged."""
        return self._start(lambda handle, over: handle.aio_flush(over))

    def start_extents(self, offset: int, length: int, context: str) -> Future[list[Extent]]:
        """The runs from ``offset`` on, at least one, none empty; they may end before or after the range."""
        self._check_range(offset, length)
        runs: list[Extent] = []

        def collect(name: str, start: int, entries: list[int], error: ErrorCell) -> int:
            if name == context and start == offset:
                runs.extend(Extent(*entries[i : i + 2]) for i in range(0, len(entries), 2))
            return 0

        def checked() -> list[Extent]:
            if not runs or any(run.length <= 0 for run in runs):
                raise OSError(errno.EPROTO, f"{self.uri}: the server's block status at {offset} is empty")
            return runs

        length = min(length, STATUS_LIMIT)
        return self._start(
            lambda handle, over: handle.aio_block_status(length, offset, collect, over), checked
        )

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes at ``offset``; OSError if the server fails, hangs up or does not answer."""
        self._check_range(offset, length)
        data = bytearray(length)
        part = min(_READ_PART, self.export.maximum_block or _READ_PART)
        started: deque[Future[None]] = deque()
        with memoryview(data) as view:
            for begin in range(0, length, part):
                if len(started) == _READS_AT_ONCE:
                    started.popleft().result()
                started.append(self.start_read(offset + begin, view[begin : begin + part]))
            for future in started:
                future.result()
        return bytes(data)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """The runs of ``base:allocation`` (flags NBD_STATE_HOLE 1, NBD_STATE_ZERO 2) that make up a range.

        Without block status on the server the whole range counts as data. Raises OSError like :meth:`read`.
        """
        self._check_range(offset, length)
        if not self.export.has_extents:
            return [Extent(length, 0)] if length else []
        runs: list[Extent] = []
        while length:
            for run in self.start_extents(offset, length, BASE_ALLOCATION).result():
                run = Extent(min(run.length, length), run.flags)
                runs.append(run)
                offset, length = offset + run.length, length - run.length
                if not length:
                    break
        return runs

    def close(self) -> None:
        """Take leave of the server, if it still listens, and free the connection. Requests in flight fail."""
        with self._lock:
            self._closing = True
            thread = self._thread
            if thread is not None and self._handle is not None:
                os.eventfd_write(self._wake, 1)
        if thread is None:
            self._end(OSError(errno.ENOTCONN, f"{self.uri}: the connection is closed"))
        else:
            thread.join(2 * _CLOSE_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.export.size:
            raise OSError(errno.EINVAL, f"{self.uri}: {length} bytes at {offset} are not within the export")

    def _start(
        self, issue: Callable[[Handle, Completion], int], result: Callable[[], Any] = lambda: None
    ) -> Future[Any]:
        """Send a request; OSError when that cannot be done."""
        request = _Request(time.monotonic() + self._timeout, result)

        def over(error: ErrorCell) -> int:
            self._over.append((request, error.value))
            return 1

        with self._lock:
            handle = self._handle
            if handle is None or self._closing:
                raise OSError(errno.ENOTCONN, f"{self.uri}: the connection is closed")
            if self._thread is None:
                self._thread = self._listen()
            self._in_flight[request] = None
            try:
                issue(handle, over)
            except HandleError as error:
                self._in_flight.pop(request, None)
                number = errno.ENOTCONN if is_over(handle) else error.errnum
                raise OSError(number or errno.EIO, f"{self.uri}: {error.args[0]}") from error
            if self._over or needs_waking(handle):
                os.eventfd_write(self._wake, 1)
        return request.future

    def _listen(self) -> Thread:
        """Receive replies from now on. Where that cannot be done the connection is as good as lost."""
        thread = Thread(self._run, str(self.uri))
        try:
            thread.start()
        except OSError as error:
            raise OSError(errno.ENOTCONN, f"{self.uri}: {error.strerror}") from error
        return thread

    def _run(self) -> None:
        """Receive replies until the connection ends, for whatever reason."""
        handle = self._handle
        assert handle is not None
        reason = OSError(errno.ENOTCONN, f"{self.uri}: the connection is closed")
        try:
            while not self._closing:
                if is_over(handle):
                    raise OSError(errno.ENOTCONN, f"{self.uri}: the server hung up")
                drive_once(handle, self._seconds_left(), self._wake)
                self._complete()
        except HandleError:
            reason = OSError(errno.ENOTCONN, f"{self.uri}: the server hung up")
        except OSError as error:
            reason = error
        finally:
            del handle
            self._end(reason)

    def _seconds_left(self) -> float:
        """Until a request is late, also one that comes while this is waited for; TimeoutError when one is."""
        with self._lock:
            oldest = next(iter(self._in_flight), None)
        if oldest is None:
            return self._timeout
        left = oldest.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, f"{self.uri}: no answer within {self._timeout:g} s")
        return left

    def _complete(self) -> None:
        """Complete what libnbd says is over, without libnbd's lock, so that callbacks may go on from here."""
        while self._over:
            request, number = self._over.popleft()
            if request in self._in_flight:
                del self._in_flight[request]
                if number:
                    request.future.set_exception(OSError(number, f"{self.uri}: {os.strerror(number)}"))
                else:
                    request.succeed()

    def _end(self, reason: OSError) -> None:
        """Free the handle, and only then fail what is in flight: libnbd touches no buffer any more."""
        with self._lock:
            handle, self._handle = self._handle, None
            if handle is None:
                return
            os.close(self._wake)
        if self._closing:
            _take_leave(handle)
        self._complete()
        del handle
        # A libnbd newer than 1.14 calls back for each request that it gives up then; we know better why.
        self._over.clear()
        for request in list(self._in_flight):
            del self._in_flight[request]
            request.future.set_exception(OSError(reason.errno, reason.strerror))


def _take_leave(handle: Handle) -> None:
    try:
        handle.aio_disconnect()
        drive(handle, lambda: is_over(handle), time.monotonic() + _CLOSE_TIMEOUT)
    except (OSError, HandleError):
        pass  # the connection was lost already; nothing was promised that this could break
