"""A supervisor's socket with a name, beside the log of its process, by which whoever comes later finds it.

    b.raw.qemu.log      ->  b.raw.qemu.supervisor

A socket's path may have 107 bytes only, and an image may lie deep: it is named by way of its directory's
descriptor, so that its file name alone counts.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

BACKLOG = 8
"""Connections that wait while somebody is listened to."""


def socket_beside(log: Path) -> Path:
    """Return the name of the socket of the supervisor whose process writes to this log."""
    return log.parent / f"{log.name.removesuffix('.log')}.supervisor"


def listen(path: Path) -> socket.socket:
    """Listen at a name; what nobody listens at any more gives way. Only the owner may connect.

    Raises OSError, FileExistsError where somebody listens there, or where it is no socket.
    """
    if path.is_socket():
        with suppress(ConnectionRefusedError):
            connect(path).close()
            raise FileExistsError(f"{path}: somebody listens there already")
        path.unlink()
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            _named(path, made.bind)
        finally:
            os.umask(before)
        made.listen(BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def connect(path: Path) -> socket.socket:
    """Connect to who listens at a name. Raises OSError."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _named(path, made.connect)
    except BaseException:
        made.close()
        raise
    return made


def _named(path: Path, use: Callable[[str], None]) -> None:
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        use(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.close(directory)
