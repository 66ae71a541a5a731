"""Standard input and output for a socket: the end of an ssh connection on the destination's host."""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from nbdserve.client.dial import Countdown, connect_unix
from nbdserve.common.errors import ConnectError, reason_of
from nbdserve.common.threads import Thread

_CONNECT = 10.0
"""Seconds in which whoever listens must have accepted."""
_PIECE = 256 << 10


def relay(path: str) -> None:
    """Pass everything on between standard input and output and the socket at ``path``, until that ends.

    Raises ConnectError when nobody listens there.
    """
    try:
        peer = connect_unix(path, Countdown(_CONNECT))
    except TimeoutError as error:
        raise ConnectError(f"unix:{path}: no answer within {_CONNECT:g} s") from error
    except OSError as error:
        raise ConnectError(f"unix:{path}: {reason_of(error)}") from error
    with peer:
        peer.setblocking(True)
        Thread(_pass_in, "stdin", peer).start()
        with contextlib.suppress(OSError):
            _pass_out(peer)


def _pass_in(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):
        try:
            # What RAM and disks come by, so without a copy; sshd gives a command pipes.
            while os.splice(0, peer.fileno(), _PIECE):
                pass
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _copy_in(peer)
    with contextlib.suppress(OSError):
        peer.shutdown(socket.SHUT_WR)


def _copy_in(peer: socket.socket) -> None:
    """Pass standard input on where it is no pipe."""
    buffer = memoryview(bytearray(_PIECE))
    while count := os.readv(0, (buffer,)):
        peer.sendall(buffer[:count])


def _pass_out(peer: socket.socket) -> None:
    buffer = memoryview(bytearray(_PIECE))
    while count := peer.recv_into(buffer):
        sent = 0
        while sent < count:
            sent += os.write(1, buffer[sent:count])
