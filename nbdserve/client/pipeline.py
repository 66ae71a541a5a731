"""One connection to an export, with many requests in flight.

Whoever starts a request sends it, as far as the socket takes it, and gets a Future. One thread for each
connection receives the replies and completes the Futures, also when the server dies, falls silent or breaks
the protocol, and when the thread itself fails: no Future stays open.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from nbdserve.client.dial import SILENT_NETWORK, Countdown, Target, is_cut_off, unsent
from nbdserve.client.export import Export
from nbdserve.client.flight import Flight, Request
from nbdserve.client.handle import (
    CHUNK_ERROR,
    Completion,
    ErrorCell,
    Handle,
    HandleError,
    drive,
    drive_once,
    is_over,
    loss,
    needs_waking,
    open_handle,
)
from nbdserve.client.replies import Coverage, broken, sound_status
from nbdserve.common.threads import Thread
from nbdserve.protocol.constants import CommandFlags
from nbdserve.protocol.extents import Extent
from nbdserve.protocol.offers import BASE_ALLOCATION

_LOG = logging.getLogger("nbdserve.client")

DEFAULT_TIMEOUT = 10.0
"""Seconds in which a server must take a connection, and for which it may be silent until it is made."""

SILENCE = 60.0
"""Seconds for which a server may be silent while it is asked for something: its disk may be slow."""

STATUS_LIMIT = 1 << 30
"""Longest block status request in bytes: short enough that a slow server answers it in good time."""

_READ_PART = 1 << 20
_READS_AT_ONCE = 4
"""How ``Client.read`` cuts up long ranges, in bytes and requests."""

_CLOSE_TIMEOUT = 1.0

Buffer = bytes | bytearray | memoryview


def connect(
    uri: Target,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    silence: float = SILENCE,
    contexts: Sequence[str] | None = (BASE_ALLOCATION,),
    block_sizes: bool = True,
) -> Client:
    """Connect to an export; limits in seconds: ``timeout`` until then, ``silence`` for what is asked later.

    ``contexts`` are the meta contexts to ask for, None for all that the server lists; ``block_sizes`` says
    whether to ask for the server's constraints on requests. Raises ConnectError when nobody answers there in
    time, or refuses the export.
    """
    handle, export = open_handle(uri, contexts, block_sizes, timeout)
    return Client(uri, export, handle, silence)


class Client:
    """One connection to an export, made by :func:`connect`.

    Futures end with an OSError: ENOTCONN when the connection is lost; ETIMEDOUT when the server is silent for
    too long, and EPROTO when it breaks the protocol so that nothing more can be understood, which end the
    connection; EPROTO also when it answered something else than what was asked, else what the server says.
    Their callbacks run in the connection's own thread and must not wait.

    Safe for several threads. The lock is held while a request is handed to libnbd, which sends what the
    socket takes and never waits; Flight's lock, and then libnbd's own, are taken under it. Only :meth:`close`
    waits, without it, for at most two seconds.
    """

    def __init__(self, uri: Target, export: Export, handle: Handle, silence: float) -> None:
        self.uri = uri
        self.export = export
        self._name = str(uri)
        self._lock = threading.Lock()
        self._handle: Handle | None = handle
        self._thread: Thread | None = None
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._unsent = 0
        self._flight = Flight(silence)
        # libnbd's callbacks run with libnbd's own lock held, so they take none of ours: they only append.
        self._over: deque[tuple[Request[Any], int]] = deque()

    @property
    def size(self) -> int:
        """Return the size of the export in bytes."""
        return self.export.size

    @property
    def connected(self) -> bool:
        """Tell whether the connection still stands, as far as is known."""
        return self._handle is not None

    @property
    def quiet(self) -> float:
        """Tell for how many seconds nothing has moved although something is asked for; 0 if nothing is."""
        return self._flight.quiet

    def start_read(self, offset: int, buffer: memoryview) -> Future[None]:
        """Fill ``buffer``, which must stay as it is until the Future is done."""
        self._check_range(offset, len(buffer))
        if not self.export.structured_replies:
            return self._start(lambda handle, over: handle.aio_pread(buffer, offset, over))
        coverage = Coverage(offset, len(buffer))

        def take(data: memoryview, place: int, kind: int, error: ErrorCell) -> int:
            try:
                if kind != CHUNK_ERROR:
                    coverage.add(place, len(data))
            except MemoryError:
                error.value = errno.ENOMEM
                return -1
            return 0

        return self._start(
            lambda handle, over: handle.aio_pread_structured(buffer, offset, take, over),
            coverage.require_whole,
        )

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
        """Ask for the runs from ``offset`` on: at least one, none empty; the last may end anywhere."""

        def extents(status: list[int]) -> list[Extent]:
            return [Extent(*status[i : i + 2]) for i in range(0, len(status), 2)]

        return self._start_status(offset, length, context, extents)

    def start_status(self, offset: int, length: int, context: str) -> Future[list[int]]:
        """Do the same, where there may be many runs: the Future's are lengths and flags in turn."""
        return self._start_status(offset, length, context, lambda status: status)

    def _start_status(
        self, offset: int, length: int, context: str, result: Callable[[list[int]], Any]
    ) -> Future[Any]:
        self._check_range(offset, length)
        length = min(length, STATUS_LIMIT)
        size, block = self.export.size, self.export.minimum_block or 1
        replies: list[list[int]] = []

        def collect(name: str, start: int, entries: list[int], error: ErrorCell) -> int:
            if name == context and start == offset:
                replies.append(entries)
            return 0

        return self._start(
            lambda handle, over: handle.aio_block_status(length, offset, collect, over),
            lambda: result(sound_status(replies, offset, length, size, block)),
        )

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes at ``offset``; OSError if the server fails, hangs up or does not answer."""
        self._check_range(offset, length)
        data = bytearray(length)
        part = self.export.payload(_READ_PART)
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
        """Return a range's runs of ``base:allocation`` (flags NBD_STATE_HOLE 1, NBD_STATE_ZERO 2).

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

    def hang_up(self) -> None:
        """Let the connection end; :meth:`close` waits until it has."""
        with self._lock:
            self._closing = True
            if self._thread is not None and self._handle is not None:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Take leave of the server, if it still listens, and free the connection. Requests in flight fail."""
        self.hang_up()
        if self._thread is None:
            self._end(OSError(errno.ENOTCONN, "the connection is closed"))
        else:
            self._thread.join(2 * _CLOSE_TIMEOUT)

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
        request = Request(result)

        def over(error: ErrorCell) -> int:
            self._over.append((request, error.value))
            return 1

        with self._lock:
            handle = self._handle
            if handle is None or self._closing:
                raise OSError(errno.ENOTCONN, f"{self.uri}: the connection is closed")
            if self._thread is None:
                self._thread = self._listen()
            self._flight.begin(request)
            try:
                issue(handle, over)
            except HandleError as error:
                self._flight.end(request)
                number = errno.ENOTCONN if is_over(handle) else error.errnum
                raise OSError(number or errno.EIO, f"{self.uri}: {error.args[0]}") from error
            except BaseException:
                self._flight.end(request)
                raise
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
        reason = OSError(errno.ENOTCONN, "the connection is closed")
        try:
            while not self._closing:
                if is_over(handle):
                    raise OSError(errno.ENOTCONN, "the server hung up")
                if drive_once(handle, self._flight.seconds_to_look(), self._wake):
                    self._flight.moved()
                else:
                    self._look(handle)
                self._complete()
        except HandleError as error:
            reason = loss(error)
        except OSError as error:
            reason = error
        except Exception as error:  # noqa: BLE001 - those who wait must be told, whatever it is
            reason = OSError(errno.ENOTCONN, f"its thread has failed: {error!r}")
            _LOG.error("%s: the connection's thread has failed: %r", self.uri, error)
        finally:
            del handle
            self._end(reason)

    def _look(self, handle: Handle) -> None:
        """Nothing came. What was sent may still be on its way, or its way be cut off: TimeoutError."""
        quiet = self._flight.quiet
        if quiet < self._flight.look:
            return
        fd = handle.aio_get_fd()
        before, self._unsent = self._unsent, unsent(fd)
        if self._unsent < before:
            self._flight.moved()
        elif quiet >= SILENT_NETWORK and is_cut_off(fd):
            raise TimeoutError(
                errno.ETIMEDOUT, f"its host has acknowledged nothing for {SILENT_NETWORK:g} s: cut off"
            )

    def _complete(self, reason: OSError | None = None) -> None:
        """Complete what libnbd says is over, without libnbd's lock, so that callbacks may go on from here.

        ``reason`` is why the connection has ended, if it has.
        """
        while self._over:
            request, number = self._over.popleft()
            if not self._flight.end(request):
                continue
            if not number:
                request.succeed(self._name)
            elif number == errno.ENOTCONN and reason is not None:
                self._fail(request, reason)
            elif number == errno.EPROTO:
                self._fail(request, broken("a reply makes no sense"))
            else:
                self._fail(request, OSError(number, os.strerror(number)))

    def _fail(self, request: Request[Any], reason: OSError) -> None:
        request.future.set_exception(OSError(reason.errno, f"{self.uri}: {reason.strerror}"))

    def _end(self, reason: OSError) -> None:
        """Free the handle, and only then fail what is in flight: libnbd touches no buffer any more."""
        with self._lock:
            handle, self._handle = self._handle, None
            if handle is None:
                return
            os.close(self._wake)
        if self._closing:
            _take_leave(handle)
        self._complete(reason)
        del handle
        # A libnbd newer than 1.14 calls back for each request that it gives up then; we know better why.
        self._over.clear()
        for request in self._flight.end_all():
            self._fail(request, reason)


def _take_leave(handle: Handle) -> None:
    try:
        handle.aio_disconnect()
        drive(handle, lambda: is_over(handle), Countdown(_CLOSE_TIMEOUT))
    except (OSError, HandleError):
        pass  # the connection was lost already; nothing was promised that this could break
