"""libnbd's handle, of its Python binding ``nbd``.

libnbd itself waits for ever. Here a handle is driven by poll(2) under a limit, with libnbd's ``aio_``
functions. What goes wrong while connecting is a ConnectError for the operator.
"""

from __future__ import annotations

import errno
import math
import os
import select
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from nbdserve.client import tlsfaults, trust
from nbdserve.client.dial import (
    Countdown,
    Target,
    Through,
    begin,
    connect_tcp,
    connect_unix,
    in_time,
    race,
    resolve,
    tune,
)
from nbdserve.client.export import Export
from nbdserve.client.libnbd import nbd
from nbdserve.client.replies import broken
from nbdserve.common.errors import ConnectError
from nbdserve.common.uri import NbdUri, TlsType
from nbdserve.protocol.constants import MAX_STRING

HandleError = nbd.Error
"""What every method of a handle raises; ``errnum`` is its errno, or 0."""

_EXPLANATION = 3.0
"""Seconds for each connection that is made to explain why TLS has failed."""

_TRANSPORT = "recv", "send", "gnutls"
"""What libnbd's messages begin with where the trouble is on the way and there is no errno for it."""

_MAX_CONTEXTS = 64
"""How many of the contexts that a server lists are asked for."""


class ErrorCell(Protocol):
    """Where libnbd leaves the errno of a request for its callbacks."""

    value: int


Completion = Callable[[ErrorCell], int]
"""Called once when a request is over; returning 1 says that nobody will ask for it again."""

OnChunk = Callable[[memoryview, int, int, ErrorCell], int]
"""Called with a piece of a read's data, its offset, and what it is: data, zeros or, empty, an error."""

CHUNK_ERROR: int = nbd.READ_ERROR
"""What a piece is that only says where an error is."""

OnExtents = Callable[[str, int, list[int], ErrorCell], int]
"""Called with a context, the offset, and lengths and flags in turn."""


class Handle(Protocol):
    """The part of libnbd's handle that is used here, with types.

    Several threads may use a handle; callbacks run in any of them, with libnbd's lock held.
    """

    def set_export_name(self, export_name: str) -> None: ...
    def add_meta_context(self, name: str) -> None: ...
    def set_request_block_size(self, request: bool) -> None: ...
    def set_pread_initialize(self, request: bool) -> None: ...
    def set_opt_mode(self, enable: bool) -> None: ...
    def set_tls(self, tls: int) -> None: ...
    def set_tls_certificates(self, dir: str) -> None: ...  # noqa: A002
    def set_tls_verify_peer(self, verify: bool) -> None: ...
    def set_tls_username(self, username: str) -> None: ...
    def set_tls_psk_file(self, filename: str) -> None: ...
    def aio_connect_tcp(self, hostname: str, port: str) -> None: ...
    def aio_connect_socket(self, sock: int) -> None: ...
    def aio_opt_list_meta_context(self, context: Callable[[str], int], completion: Completion) -> int: ...
    def aio_opt_go(self, completion: Completion) -> None: ...
    def aio_is_connecting(self) -> bool: ...
    def aio_is_negotiating(self) -> bool: ...
    def aio_is_ready(self) -> bool: ...
    def aio_is_closed(self) -> bool: ...
    def aio_is_dead(self) -> bool: ...
    def aio_get_fd(self) -> int: ...
    def aio_get_direction(self) -> int: ...
    def aio_notify_read(self) -> None: ...
    def aio_notify_write(self) -> None: ...
    def aio_pread(self, buf: memoryview, offset: int, completion: Completion) -> int: ...
    def aio_pread_structured(
        self, buf: memoryview, offset: int, chunk: OnChunk, completion: Completion
    ) -> int: ...
    def aio_pwrite(
        self, buf: bytes | bytearray | memoryview, offset: int, completion: Completion, flags: int
    ) -> int: ...
    def aio_zero(self, count: int, offset: int, completion: Completion, flags: int) -> int: ...
    def aio_trim(self, count: int, offset: int, completion: Completion, flags: int) -> int: ...
    def aio_cache(self, count: int, offset: int, completion: Completion) -> int: ...
    def aio_flush(self, completion: Completion) -> int: ...
    def aio_block_status(self, count: int, offset: int, extent: OnExtents, completion: Completion) -> int: ...
    def aio_disconnect(self) -> None: ...
    def get_size(self) -> int: ...
    def get_block_size(self, size_type: int) -> int: ...
    def get_structured_replies_negotiated(self) -> bool: ...
    def is_read_only(self) -> bool: ...
    def is_rotational(self) -> bool: ...
    def can_flush(self) -> bool: ...
    def can_fua(self) -> bool: ...
    def can_trim(self) -> bool: ...
    def can_zero(self) -> bool: ...
    def can_fast_zero(self) -> bool: ...
    def can_cache(self) -> bool: ...
    def can_multi_conn(self) -> bool: ...
    def can_meta_context(self, metacontext: str) -> bool: ...


def open_handle(
    uri: Target, contexts: Sequence[str] | None, block_sizes: bool, timeout: float
) -> tuple[Handle, Export]:
    """Connect to an export; None asks for all contexts that the server lists.

    Raises ConnectError when nobody takes the connection within ``timeout`` seconds, or the server then says
    nothing for so long, or refuses the export, or cannot be trusted.
    """
    if isinstance(uri, Through):
        return _open(uri, contexts, block_sizes, timeout, None)
    with trust.certificates(uri) as directory:
        try:
            return _open(uri, contexts, block_sizes, timeout, directory)
        except ConnectError as error:
            # What is not libnbd's own error comes from before TLS, or from after it.
            is_strange = not isinstance(error.__cause__, OSError)
            if is_strange and (why := tlsfaults.explain(uri, directory, _EXPLANATION)):
                raise ConnectError(f"{uri}: {why}") from error
            raise


def _open(
    uri: Target,
    contexts: Sequence[str] | None,
    block_sizes: bool,
    timeout: float,
    certificates: Path | None,
) -> tuple[Handle, Export]:
    """Do so, with these files for TLS."""
    limit = Countdown(timeout)
    handle: Handle = nbd.NBD()
    try:
        handle.set_export_name(uri.export)
        for context in contexts or ():
            handle.add_meta_context(context)
        handle.set_request_block_size(block_sizes)
        handle.set_opt_mode(contexts is None)
        # A read that is not covered by its reply fails: what was in the buffer is nobody's data.
        handle.set_pread_initialize(False)
        if isinstance(uri, Through):
            _hand_over(handle, uri.dial())
        else:
            _set_tls(handle, uri, certificates)
            _start(handle, uri, limit)
        tune(handle.aio_get_fd())
        limit.moved()
        drive(handle, lambda: not handle.aio_is_connecting(), limit)
        if handle.aio_is_negotiating():
            contexts = _haggle(handle, limit)
        if not handle.aio_is_ready():
            raise ConnectError(f"{uri}: the server hung up before it offered the export")
        export = _describe(handle, contexts or ())
    except TimeoutError as error:
        why = error.strerror or f"no answer within {timeout:g} s"
        raise ConnectError(f"{uri}: {why}; is it an NBD server?") from error
    except (OSError, nbd.Error) as error:
        raise ConnectError(f"{uri}: {_why(error)}") from error
    return handle, export


def drive(handle: Handle, done: Callable[[], bool], limit: Countdown) -> None:
    """Let libnbd work until ``done``; TimeoutError when there is silence for too long."""
    while not done():
        if drive_once(handle, limit.left):
            limit.moved()


def drive_once(handle: Handle, seconds: float, wake: int | None = None) -> bool:
    """Wait, at most so long, until the server can be heard or spoken to, and let libnbd do so once.

    ``wake`` is an eventfd that ends the wait as well. Returns whether anything came or went. Raises
    HandleError when the connection ends.
    """
    poll = select.poll()
    fd, direction = handle.aio_get_fd(), handle.aio_get_direction()
    wanted = select.POLLIN * bool(direction & nbd.AIO_DIRECTION_READ)
    wanted |= select.POLLOUT * bool(direction & nbd.AIO_DIRECTION_WRITE)
    poll.register(fd, wanted)
    if wake is not None:
        poll.register(wake, select.POLLIN)
    moved = False
    for ready, happened in poll.poll(math.ceil(seconds * 1000)):
        if ready == wake:
            os.eventfd_read(wake)
        elif direction & nbd.AIO_DIRECTION_READ and happened & ~select.POLLOUT:
            handle.aio_notify_read()
            moved = True
        elif direction & nbd.AIO_DIRECTION_WRITE:
            handle.aio_notify_write()
            moved = True
    return moved


def needs_waking(handle: Handle) -> bool:
    """Tell whether a thread that waits for the server has to look again: there is something to send."""
    return bool(handle.aio_get_direction() != nbd.AIO_DIRECTION_READ)


def loss(error: nbd.Error) -> OSError:
    """Tell why a connection ended: EPROTO when what came makes no sense, else ENOTCONN."""
    text = _why(error)
    if error.errnum == errno.EPROTO or (not error.errnum and not text.startswith(_TRANSPORT)):
        return broken(text)
    return OSError(errno.ENOTCONN, "the server hung up")


def is_over(handle: Handle) -> bool:
    """Tell whether the connection has ended, one way or the other."""
    return handle.aio_is_closed() or handle.aio_is_dead()


def _haggle(handle: Handle, limit: Countdown) -> list[str]:
    """Ask for every context that the server lists, and for the export; OSError when it refuses that."""
    listed: list[str] = []
    outcome: list[int] = []

    def add(context: str) -> int:
        if len(listed) < _MAX_CONTEXTS and len(context.encode()) <= MAX_STRING:
            listed.append(context)
        return 0

    def complete(error: ErrorCell) -> int:
        outcome.append(error.value)
        return 1

    try:
        handle.aio_opt_list_meta_context(add, complete)
        drive(handle, lambda: bool(outcome), limit)
    except nbd.Error:
        if is_over(handle):
            raise
        # A server without structured replies has no contexts to list.
    for context in listed:
        handle.add_meta_context(context)
    outcome.clear()
    handle.aio_opt_go(complete)
    drive(handle, lambda: bool(outcome) and not handle.aio_is_connecting(), limit)
    if outcome[0] == errno.ENOENT:
        raise OSError(errno.ENOENT, "the server has no export of that name")
    if outcome[0]:
        raise OSError(outcome[0], f"the server refuses the export: {os.strerror(outcome[0])}")
    return listed


def _start(handle: Handle, uri: NbdUri, limit: Countdown) -> None:
    """Give libnbd a connected socket."""
    if uri.socket is not None:
        _hand_over(handle, connect_unix(uri.socket, limit))
    elif uri.tls is None or uri.tls.psk_file is not None:
        _hand_over(handle, connect_tcp(uri.host, uri.port, limit))
    else:
        _start_verified(handle, uri, limit)


def _hand_over(handle: Handle, peer: socket.socket) -> None:
    # libnbd closes it from now on, also when this fails, as where the server has refused already.
    handle.aio_connect_socket(peer.detach())


def _start_verified(handle: Handle, uri: NbdUri, limit: Countdown) -> None:
    """Give libnbd a connected socket, and the name that the server's certificate must have.

    libnbd 1.14 learns the name only where it connects by itself, and then it tries one address, in a call
    that looks the name up for as long as that takes. So it gets another socket in place of its own, unless
    that is the first to be connected.
    """
    first, *others = resolve(uri.host, uri.port, limit)
    in_time(lambda: handle.aio_connect_tcp(uri.host, str(uri.port)), f"connect to {uri.host}", limit)
    fd = handle.aio_get_fd()
    own = socket.socket(fileno=os.dup(fd))
    attempts: list[tuple[str, Callable[[], socket.socket]]] = [(str(first), lambda: own)]
    attempts += [(str(each), partial(begin, each)) for each in others]
    with race(attempts, limit) as peer:
        if peer is not own:
            os.dup2(peer.fileno(), fd, inheritable=False)


def _set_tls(handle: Handle, uri: NbdUri, certificates: Path | None) -> None:
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
    if certificates is not None:
        handle.set_tls_certificates(str(certificates))
    if tls.psk_file is not None:
        handle.set_tls_psk_file(tls.psk_file)
    if uri.user is not None:
        handle.set_tls_username(uri.user)


def _describe(handle: Handle, contexts: Sequence[str]) -> Export:
    return Export(
        size=_size(handle),
        read_only=handle.is_read_only(),
        multi_conn=handle.can_multi_conn(),
        flush=handle.can_flush(),
        fua=handle.can_fua(),
        trim=handle.can_trim(),
        zero=handle.can_zero(),
        fast_zero=handle.can_fast_zero(),
        cache=handle.can_cache(),
        rotational=handle.is_rotational(),
        structured_replies=handle.get_structured_replies_negotiated(),
        contexts=tuple(name for name in contexts if handle.can_meta_context(name)),
        minimum_block=handle.get_block_size(nbd.SIZE_MINIMUM),
        preferred_block=handle.get_block_size(nbd.SIZE_PREFERRED),
        maximum_block=handle.get_block_size(nbd.SIZE_MAXIMUM),
    )


def _size(handle: Handle) -> int:
    """The export's size in bytes; OSError for one of 8 EiB or more, which libnbd takes for a negative one."""
    try:
        size = handle.get_size()
    except nbd.Error:
        # It takes the largest of all for its own failure, and says nothing of it.
        size = -1
    if size < 0:
        raise OSError(errno.EOVERFLOW, "the server tells a size that no disk can have")
    return size


def _why(error: Exception) -> str:
    """What went wrong, without the names of libnbd's functions."""
    text = str(error.args[0] if isinstance(error, nbd.Error) else getattr(error, "strerror", None) or error)
    return text.split(": ", 1)[-1] if text.startswith("nbd_") else text
