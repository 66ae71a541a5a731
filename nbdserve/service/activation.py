"""Sockets that were opened for this process by systemd, or by whoever speaks its protocol (sd_listen_fds(3)).

LISTEN_PID      whom they are for
LISTEN_FDS      how many there are, from descriptor 3 on
LISTEN_FDNAMES  their names, separated by colons; here the name ``qmp`` means the monitor
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

from nbdserve.common.errors import ConnectError, UsageError
from nbdserve.connection.listeners import Listener, Visitor, visitor

_FIRST = 3
_MONITOR = "qmp"
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


@dataclass(frozen=True)
class Inheritance:
    """What this process was given: sockets that listen, clients that are connected, and the monitor."""

    listeners: tuple[Listener, ...] = ()
    visitors: tuple[Visitor, ...] = ()
    monitor: Listener | None = None

    def __bool__(self) -> bool:
        return bool(self.listeners or self.visitors)


def inherit(environment: MutableMapping[str, str]) -> Inheritance:
    """Take over the sockets, and take what is said of them out of the environment: children get neither.

    Raises UsageError when the variables make no sense, ConnectError when a socket is of no use.
    """
    pid, count, names = (environment.pop(name, "") for name in _VARIABLES)
    if pid != str(os.getpid()) or not count:
        return Inheritance()
    if not count.isdecimal() or not 0 < int(count) <= os.sysconf("SC_OPEN_MAX"):
        raise UsageError(f"LISTEN_FDS={count}: not a number of sockets")
    listeners: list[Listener] = []
    visitors: list[Visitor] = []
    monitor = None
    for index, name in enumerate(_pad(names.split(":"), int(count))):
        sock = _socket(_FIRST + index, name)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            visitors.append(visitor(sock))
        elif name == _MONITOR:
            monitor = Listener(sock)
        else:
            listeners.append(Listener(sock))
    return Inheritance(tuple(listeners), tuple(visitors), monitor)


def _pad(names: list[str], count: int) -> list[str]:
    return (names + [""] * count)[:count]


def _socket(descriptor: int, name: str) -> socket.socket:
    where = f"descriptor {descriptor} ({name})" if name else f"descriptor {descriptor}"
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise ConnectError(f"{where} of LISTEN_FDS: {error.strerror}, it must be a socket") from error
    known = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
    if sock.type != socket.SOCK_STREAM or sock.family not in known:
        raise ConnectError(f"{where} of LISTEN_FDS: it must be a stream socket, TCP or Unix")
    return sock
