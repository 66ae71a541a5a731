"""Paths of Unix sockets, which the kernel keeps short."""

from __future__ import annotations

import os

from nbdserve.common.errors import UsageError

SOCKET_PATH_LIMIT = 107
"""Longest path of a Unix socket in bytes: ``sun_path`` less its final NUL."""

_ROOM = 60
"""Bytes that temporary directories and the sockets in them add to a path."""


def check_socket_path(path: str, where: str) -> str:
    """Return the path of a Unix socket; UsageError when it is empty or too long.

    ``where`` is the option or key that it comes from, for the message.
    """
    length = len(os.fsencode(path))
    if not length:
        raise UsageError(f"{where}: name a Unix socket, by a path of 1 to {SOCKET_PATH_LIMIT} bytes")
    if length > SOCKET_PATH_LIMIT:
        raise UsageError(
            f"{where}: {path} has {length} bytes, a Unix socket's path at most {SOCKET_PATH_LIMIT}: choose a "
            "shorter one, or one that is relative to the working directory"
        )
    return path


def place_for_sockets() -> str:
    """Return the directory for temporary files, or /tmp where it leaves no room for the names of sockets."""
    # Imported where it is used, as it brings a lot with it.
    import tempfile

    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= SOCKET_PATH_LIMIT - _ROOM else "/tmp"
