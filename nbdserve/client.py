"""The client's side of NBD, through libnbd: the one module that imports its Python binding ``nbd``.

libnbd itself waits for ever. Here every call has a time limit: requests are started with its ``aio_``
functions and driven to their end by poll(2) under a deadline. While connecting, what goes wrong is a
ConnectError for the operator; afterwards it is an OSError with an errno, as everywhere in the data path.

One client belongs to one thread at a time.
"""

from __future__ import annotations

import errno
import math
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import nbd

from nbdserve.errors import ConnectError
from nbdserve.protocol.extents import Extent
from nbdserve.uri import NbdUri, TlsType

DEFAULT_TIMEOUT = 10.0
"""Seconds that connecting, or one request, may take."""

_READ_LIMIT = 4 << 20
_STATUS_LIMIT = 1 << 30
"""Longest single request in bytes: short enough that a slow link answers it within the time limit."""

_CLOSE_TIMEOUT = 1.0
_BASE_ALLOCATION = "base:allocation"


class _Buffer(Protocol):
    """libnbd's buffer for asynchronous reads."""

    def to_buffer(self) -> bytearray: ...


class _Handle(Protocol):
    """The part of libnbd's handle that is used here, with types. Everything raises ``nbd.Error``."""

    def set_export_name(self, export_name: str) -> None: ...
    def add_meta_context(self, name: str) -> None: ...
    def set_tls(self, tls: int) -> None: ...
    def set_tls_certificates(self, dir: str) -> None: ...  # noqa: A002
    def set_tls_verify_peer(self, verify: bool) -> None: ...
    def set_tls_username(self, username: str) -> None: ...
    def set_tls_psk_file(self, filename: str) -> None: ...
    def aio_connect_tcp(self, hostname: str, port: str) -> None: ...
    def aio_connect_socket(self, sock: int) -> None: ...
    def aio_is_connecting(self) -> bool: ...
    def aio_is_ready(self) -> bool: ...
    def aio_is_closed(self) -> bool: ...
    def aio_is_dead(self) -> bool: ...
    def aio_get_fd(self) -> int: ...
    def aio_get_direction(self) -> int: ...
    def aio_notify_read(self) -> None: ...
    def aio_notify_write(self) -> None: ...
    def aio_command_completed(self, cookie: int) -> bool: ...
    def aio_pread(self, buf: _Buffer, offset: int) -> int: ...
    def aio_block_status(
        self, count: int, offset: int, extent: Callable[[str, int, list[int], object], int]
    ) -> int: ...
    def aio_disconnect(self) -> None: ...
    def get_size(self) -> int: ...
    def get_block_size(self, size_type: int) -> int: ...
    def is_read_only(self) -> bool: ...
    def can_multi_conn(self) -> bool: ...
    def can_meta_context(self, metacontext: str) -> bool: ...
    def get_structured_replies_negotiated(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Export:
    """What the server says of an export. Sizes in bytes; a block size of 0 means that it named none."""

    size: int
    read_only: bool
    multi_conn: bool
    """Several connections see one another's writes (NBD_FLAG_CAN_MULTI_CONN)."""
    has_extents: bool
    """The server answers block status for ``base:allocation``."""
    structured_replies: bool
    """The server offers structured replies, and this client took the offer."""
    minimum_block: int
    preferred_block: int
    maximum_block: int


def connect(uri: NbdUri, *, timeout: float = DEFAULT_TIMEOUT) -> Client:
    """Connect to an export; ``timeout`` seconds for that, and for each later request.

    Raises ConnectError when nobody answers there in time, or refuses the export.
    """
    deadline = time.monotonic() + timeout
    handle: _Handle = nbd.NBD()
    try:
        handle.set_export_name(uri.export)
        handle.add_meta_context(_BASE_ALLOCATION)
        _set_tls(handle, uri)
        if uri.socket is None:
            _start_tcp(handle, uri, deadline)
        else:
            _start_unix(handle, uri.socket, deadline)
        _drive(handle, lambda: not handle.aio_is_connecting(), deadline)
        if not handle.aio_is_ready():
            raise ConnectError(f"{uri}: the server hung up before it offered the export")
        export = _describe(handle)
    except TimeoutError as error:
        raise ConnectError(f"{uri}: no answer within {timeout:g} s; is it an NBD server?") from error
    except (OSError, nbd.Error) as error:
        raise ConnectError(f"{uri}: {_why(error)}") from error
    return Client(uri, export, handle, timeout)


class Client:
    """One connection to an export, made by :func:`connect`."""

    def __init__(self, uri: NbdUri, export: Export, handle: _Handle, timeout: float) -> None:
        self.uri = uri
        self.export = export
        self._handle: _Handle | None = handle
        self._timeout = timeout

    @property
    def size(self) -> int:
        """Size of the export in bytes."""
        return self.export.size

    def read(self, offset: int, length: int) -> bytes:
        """Read ``length`` bytes at ``offset``; OSError if the server fails, hangs up or does not answer."""
        self._check_range(offset, length)
        parts = []
        while length:
            part = min(length, _READ_LIMIT, self.export.maximum_block or _READ_LIMIT)
            parts.append(self._read_part(offset, part))
            offset, length = offset + part, length - part
        return b"".join(parts)

    def extents(self, offset: int, length: int) -> list[Extent]:
        """The runs of ``base:allocation`` (flags NBD_STATE_HOLE 1, NBD_STATE_ZERO 2) that make up a range.

        Without block status on the server the whole range counts as data. Raises OSError like :meth:`read`.
        """
        self._check_range(offset, length)
        if not self.export.has_extents:
            return [Extent(length, 0)] if length else []
        runs: list[Extent] = []
        while length:
            for run in self._block_status(offset, min(length, _STATUS_LIMIT)):
                run = Extent(min(run.length, length), run.flags)
                runs.append(run)
                offset, length = offset + run.length, length - run.length
                if not length:
                    break
        return runs

    def close(self) -> None:
        """Take leave of the server, if it still listens, and free the connection."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        try:
            handle.aio_disconnect()
            ended = lambda: handle.aio_is_closed() or handle.aio_is_dead()  # noqa: E731
            _drive(handle, ended, time.monotonic() + _CLOSE_TIMEOUT)
        except (OSError, nbd.Error):
            pass  # the connection was lost already; nothing was promised that this could break

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.export.size:
            raise OSError(errno.EINVAL, f"{self.uri}: {length} bytes at {offset} are not within the export")

    def _read_part(self, offset: int, length: int) -> bytes:
        """One read request."""
        buffer: _Buffer = nbd.Buffer(length)
        self._perform(lambda handle: handle.aio_pread(buffer, offset))
        return bytes(buffer.to_buffer())

    def _block_status(self, offset: int, length: int) -> list[Extent]:
        """One block status request; at least one run, none empty."""
        runs: list[Extent] = []

        def collect(context: str, start: int, entries: list[int], error: object) -> int:
            if context == _BASE_ALLOCATION and start == offset:
                runs.extend(Extent(*entries[i : i + 2]) for i in range(0, len(entries), 2))
            return 0

        self._perform(lambda handle: handle.aio_block_status(length, offset, collect))
        if not runs or any(run.length <= 0 for run in runs):
            raise OSError(errno.EPROTO, f"{self.uri}: the server's block status at {offset} is empty")
        return runs

    def _perform(self, start: Callable[[_Handle], int]) -> None:
        """Start one request and drive it to its end. After a timeout the connection is not used again."""
        handle = self._handle
        if handle is None:
            raise OSError(errno.ENOTCONN, f"{self.uri}: the connection is closed")
        try:
            cookie = start(handle)
            _drive(handle, lambda: handle.aio_command_completed(cookie), time.monotonic() + self._timeout)
        except TimeoutError as error:
            self._handle = None
            message = f"{self.uri}: no answer within {self._timeout:g} s"
            raise TimeoutError(errno.ETIMEDOUT, message) from error
        except nbd.Error as error:
            if handle.aio_is_closed() or handle.aio_is_dead():
                raise OSError(errno.ENOTCONN, f"{self.uri}: the server hung up") from error
            raise OSError(error.errnum or errno.EIO, f"{self.uri}: {_why(error)}") from error


def _drive(handle: _Handle, done: Callable[[], bool], deadline: float) -> None:
    """Let libnbd work until ``done``; TimeoutError at the deadline (of the monotonic clock, in seconds)."""
    poll = select.poll()
    while not done():
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        fd, direction = handle.aio_get_fd(), handle.aio_get_direction()
        wanted = select.POLLIN * bool(direction & nbd.AIO_DIRECTION_READ)
        wanted |= select.POLLOUT * bool(direction & nbd.AIO_DIRECTION_WRITE)
        poll.register(fd, wanted)
        events = poll.poll(math.ceil(left * 1000))
        poll.unregister(fd)
        for _, happened in events:
            if direction & nbd.AIO_DIRECTION_READ and happened & ~select.POLLOUT:
                handle.aio_notify_read()
            elif direction & nbd.AIO_DIRECTION_WRITE:
                handle.aio_notify_write()


def _start_tcp(handle: _Handle, uri: NbdUri, deadline: float) -> None:
    """Begin to connect. libnbd looks the name up right here, for as long as that takes: so in a thread."""
    outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def start() -> None:
        try:
            handle.aio_connect_tcp(uri.host, str(uri.port))
        except nbd.Error as error:
            outcome.put(error)
        else:
            outcome.put(None)

    threading.Thread(target=start, name=f"look up {uri.host}", daemon=True).start()
    try:
        error = outcome.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise ConnectError(f"{uri}: the name {uri.host!r} could not be looked up in time") from None
    if error:
        raise error


def _start_unix(handle: _Handle, path: str, deadline: float) -> None:
    """Connect, waiting until the deadline for a place in the server's queue; libnbd gets the socket."""
    with socket.socket(socket.AF_UNIX) as peer:
        left = max(0.001, deadline - time.monotonic())
        limit = struct.pack("@ll", int(left), int(left % 1 * 1_000_000))
        # A connect that does not block would fail at once on a full queue, so it blocks, under this limit.
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            peer.connect(path)
        except BlockingIOError as error:
            raise TimeoutError from error
        peer.setblocking(False)
        handle.aio_connect_socket(peer.fileno())
        peer.detach()  # libnbd closes it from now on


def _set_tls(handle: _Handle, uri: NbdUri) -> None:
    """Pass the URI's TLS parameters on; ConnectError for what this libnbd would silently not check."""
    tls = uri.tls
    if tls is None:
        return
    if tls.type is TlsType.ANONYMOUS:
        raise ConnectError(f"{uri}: libnbd has no anonymous TLS; use certificates or tls-psk-file")
    if tls.verify_peer and tls.psk_file is None:
        if tls.hostname not in (None, uri.host):
            raise ConnectError(
                f"{uri}: this libnbd cannot check a certificate for another name than the host's"
            )
        if uri.socket is not None:
            advice = "use tls-psk-file, or tls-verify-peer=0 if the socket's directory is private"
            raise ConnectError(f"{uri}: libnbd checks no certificate behind a Unix socket; {advice}")
    handle.set_tls(nbd.TLS_REQUIRE)
    handle.set_tls_verify_peer(tls.verify_peer)
    if tls.certificates is not None:
        handle.set_tls_certificates(tls.certificates)
    if tls.psk_file is not None:
        handle.set_tls_psk_file(tls.psk_file)
    if uri.user is not None:
        handle.set_tls_username(uri.user)


def _describe(handle: _Handle) -> Export:
    return Export(
        size=handle.get_size(),
        read_only=handle.is_read_only(),
        multi_conn=handle.can_multi_conn(),
        has_extents=handle.can_meta_context(_BASE_ALLOCATION),
        structured_replies=handle.get_structured_replies_negotiated(),
        minimum_block=handle.get_block_size(nbd.SIZE_MINIMUM),
        preferred_block=handle.get_block_size(nbd.SIZE_PREFERRED),
        maximum_block=handle.get_block_size(nbd.SIZE_MAXIMUM),
    )


def _why(error: Exception) -> str:
    """What went wrong, without the names of libnbd's functions."""
    text = str(error.args[0] if isinstance(error, nbd.Error) else getattr(error, "strerror", None) or error)
    return text.split(": ", 1)[-1] if text.startswith("nbd_") else text
