"""Listening sockets: TCP on one or all addresses, and Unix sockets.

Another family of sockets begins here (what is no Unix socket is taken for TCP, see ``accept``). Its addresses
are spelled in common/uri.py (``parse_listen_uri``), listened on in cli/main.py (``_listen``), and taken from
systemd in service/activation.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nbdserve.common.errors import ConnectError
from nbdserve.common.ownership import PRIVATE, Ownership
from nbdserve.common.threads import LOOK

_LOG = logging.getLogger("nbdserve")

BACKLOG = socket.SOMAXCONN
"""Clients that may wait to be accepted; the kernel has the last word (net.core.somaxconn)."""
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))
"""A dead peer is noticed after two minutes (seconds, seconds, probes)."""
_NOT_HERE = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EADDRNOTAVAIL, errno.EPERM, errno.EACCES)
"""What says that this machine, or what confines this process, does not have an address or its family."""
_TURN = 2.0
"""Seconds for which another server that takes a dead socket's place is waited for."""


@dataclass(frozen=True)
class Visitor:
    """A client at the door: its socket, its name for the log, and its host's address if it came over IP."""

    sock: socket.socket
    name: str
    host: str | None = None


class Listener:
    """A bound socket. ``close`` also removes the file of a Unix socket, if it is still the same."""

    tls_required = False
    """Whether clients that come here must encrypt, whatever is asked of others."""

    def __init__(self, sock: socket.socket, path: Path | None = None) -> None:
        self.sock = sock
        self._path = path
        self._identity = _identity(path) if path else None
        sock.setblocking(False)

    def __str__(self) -> str:
        return address_text(self.sock.getsockname())

    def accept(self) -> Visitor:
        """Accept one client."""
        client, address = self.sock.accept()
        if self.sock.family == socket.AF_UNIX:
            return Visitor(client, str(self))
        return _tcp_visitor(client, address)

    def close(self) -> None:
        """Stop listening."""
        self.sock.close()
        # Where privileges were dropped its directory may be out of reach; the next start replaces the file.
        with contextlib.suppress(PermissionError):
            if self._path and _identity(self._path) == self._identity:
                self._path.unlink(missing_ok=True)


def visitor(client: socket.socket) -> Visitor:
    """Return a client whose connection somebody else has accepted."""
    if client.family not in (socket.AF_INET, socket.AF_INET6):
        return Visitor(client, address_text(client.getsockname() or "inherited"))
    return _tcp_visitor(client, client.getpeername())


def _tcp_visitor(client: socket.socket, address: tuple[object, ...]) -> Visitor:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        client.setsockopt(socket.IPPROTO_TCP, option, value)
    return Visitor(client, address_text(address), _host_text(address))


def listen_tcp(host: str | None, port: int) -> list[Listener]:
    """Listen on every address that ``host`` stands for; None stands for all of this machine.

    Raises ConnectError with one line when that cannot be done.
    """
    try:
        return [Listener(sock) for sock in bind_tcp(host, port)]
    except OSError as error:
        where = address_text((host or "*", port))
        raise ConnectError(
            f"{where}: cannot listen: {error.strerror}, choose another address or port"
        ) from error


def bind_tcp(host: str | None, port: int) -> list[socket.socket]:
    """Listen on every address that ``host`` stands for; None stands for all of this machine.

    What the machine does not have, such as IPv6, is left out as long as something is left. Raises OSError.
    """
    bound: list[socket.socket] = []
    missing: list[tuple[str, OSError]] = []
    try:
        found = _addresses(host, port)
        for family, _, _, _, address in dict.fromkeys(found):
            if bound and port == 0:
                # All addresses share the port that the kernel chose for the first.
                address = (address[0], bound[0].getsockname()[1], *address[2:])
            try:
                bound.append(_bind(family, address))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing.append((address_text(address), error))
        if missing and not bound:
            raise missing[0][1]
    except BaseException:
        for sock in bound:
            sock.close()
        raise
    for name, why in missing:
        _LOG.info("%s: not listened on: %s", name, why.strerror)
    return bound


def _addresses(host: str | None, port: int) -> list[tuple[Any, ...]]:
    """What getaddrinfo(3) finds; OSError also for what cannot be a name."""
    try:
        return socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:
        raise OSError(errno.EINVAL, f"{host!r} is no name of a host") from error


def _bind(family: socket.AddressFamily, address: tuple[object, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_unix(name: str, whose: Ownership = PRIVATE) -> Listener:
    """Listen on a Unix socket; a dead socket file in its place is removed, a live one is not.

    ``whose`` it is counts from its first instant on. A name that begins with NUL is in Linux's abstract
    namespace, where nobody owns anything. Raises ConnectError or OperatorError with one line when that cannot
    be done.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path = None if name.startswith("\0") else Path(name)
    try:
        with contextlib.nullcontext() if path is None else _alone_in(path.parent):
            if path is not None:
                _remove_dead_socket(path)
            _bind_unix(sock, name, whose)
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise ConnectError(f"{address_text(name)}: cannot listen: {reason}, choose another path") from error
    except BaseException:
        sock.close()
        raise
    return Listener(sock, path)


def _bind_unix(sock: socket.socket, name: str, whose: Ownership) -> None:
    """Bind to a name; if that is a path, nobody may use the socket there before it is what it should be."""
    mode = 0o600 if whose.mode is None else whose.mode
    mask = os.umask(0o777 if whose.gives_away else 0o777 & ~mode)
    try:
        sock.bind(name)
    finally:
        os.umask(mask)
    if not whose.gives_away or name.startswith("\0"):
        return
    try:
        descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            replace(whose, mode=mode).apply(descriptor, address_text(name))
        finally:
            os.close(descriptor)
    except BaseException:
        os.unlink(name)
        raise


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keep other servers from looking for dead sockets in a directory, where it can be locked, for a moment.

    Between bind(2) and listen(2) a socket looks dead, and so it does when its server ends and the next comes.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + _TURN
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(LOOK)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


def address_text(address: tuple[object, ...] | str | bytes) -> str:
    """Return a socket address as text: IPv6 in brackets, ``unix:@NAME`` for an abstract Unix socket."""
    if isinstance(address, bytes):
        address = address.decode(errors="backslashreplace")
    if isinstance(address, str):
        return f"unix:{address.replace(chr(0), '@')}"
    host, port = _host_text(address), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host_text(address: tuple[object, ...]) -> str:
    """The host of an IP address; behind a link-local one its interface, without which it is no address."""
    host, zone = str(address[0]), address[3] if len(address) > 3 else 0
    if not isinstance(zone, int) or not zone or "%" in host:
        return host
    try:
        return f"{host}%{socket.if_indextoname(zone)}"
    except OSError:
        return f"{host}%{zone}"


def _remove_dead_socket(path: Path) -> None:
    """Remove a socket on which nobody listens; ConnectError when somebody does, OSError."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            probe.connect(str(path))
            owner = _listening(probe)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return
    except (TimeoutError, BlockingIOError):
        owner = 0
    who = f"process {owner}" if owner else "another process"
    raise ConnectError(
        f"{address_text(str(path))}: {who} listens there: end it first, or choose another path"
    )


def _listening(connection: socket.socket) -> int:
    """The process that listens at the other end of a Unix socket; 0 when that is not known here."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(told[:4], sys.byteorder)


def _identity(path: Path) -> tuple[int, ...] | None:
    """What tells a socket from one that somebody else has made at the same path, and in the same inode."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
