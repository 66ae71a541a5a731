"""Listening sockets: TCP on one or all addresses, and Unix sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from nbdserve.errors import ConnectError

BACKLOG = socket.SOMAXCONN
"""Clients that may wait to be accepted; the kernel has the last word (net.core.somaxconn)."""
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))
"""A dead peer is noticed after two minutes (seconds, seconds, probes)."""


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
    """A client whose connection somebody else has accepted."""
    if client.family not in (socket.AF_INET, socket.AF_INET6):
        return Visitor(client, address_text(client.getsockname() or "inherited"))
    return _tcp_visitor(client, client.getpeername())


def _tcp_visitor(client: socket.socket, address: tuple[object, ...]) -> Visitor:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        client.setsockopt(socket.IPPROTO_TCP, option, value)
    return Visitor(client, address_text(address), str(address[0]))


def listen_tcp(host: str | None, port: int) -> list[Listener]:
    """Listen on every address that ``host`` stands for; None stands for all of this machine.

    Raises ConnectError with one line when that cannot be done.
    """
    listeners: list[Listener] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if listeners and port == 0:
                # All addresses share the port that the kernel chose for the first.
                address = (address[0], listeners[0].sock.getsockname()[1], *address[2:])
            sock.bind(address)
            sock.listen(BACKLOG)
            listeners.append(Listener(sock))
    except OSError as error:
        for listener in listeners:
            listener.close()
        where = address_text((host or "*", port))
        raise ConnectError(
            f"{where}: cannot listen: {error.strerror}, choose another address or port"
        ) from error
    return listeners


def listen_unix(name: str) -> Listener:
    """Listen on a Unix socket with mode 0600; a dead socket file in its place is removed, a live one is not.

    A name that begins with NUL is in Linux's abstract namespace. Raises ConnectError with one line when that
    cannot be done.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path = None if name.startswith("\0") else Path(name)
    try:
        if path is not None:
            _remove_dead_socket(path)
        mask = os.umask(0o177)
        try:
            sock.bind(name)
        finally:
            os.umask(mask)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise ConnectError(f"{address_text(name)}: cannot listen: {reason}, choose another path") from error
    return Listener(sock, path)


def address_text(address: tuple[object, ...] | str | bytes) -> str:
    """A socket address as text: IPv6 in brackets, ``unix:@NAME`` for an abstract Unix socket."""
    if isinstance(address, bytes):
        address = address.decode(errors="backslashreplace")
    if isinstance(address, str):
        return f"unix:{address.replace(chr(0), '@')}"
    host, port = str(address[0]), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _remove_dead_socket(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            probe.connect(str(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
