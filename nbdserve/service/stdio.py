"""A client on standard input and output: one socket, as inetd hands it over, or two pipes, as ssh does."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
from collections.abc import Iterator

from nbdserve.common.errors import UsageError
from nbdserve.common.threads import Thread
from nbdserve.connection.listeners import Visitor, visitor

_PIECE = 256 << 10
_LAST_REPLIES = 10.0
"""Seconds in which the client may take its last replies."""


def shares_stderr() -> bool:
    """Tell whether standard error is the client as well, as with inetd: nothing must be written there."""
    return os.path.sameopenfile(sys.stderr.fileno(), 0) or os.path.sameopenfile(sys.stderr.fileno(), 1)


@contextlib.contextmanager
def client() -> Iterator[Visitor]:
    """Return the client, until its last replies are out. From now on nobody else reads or writes there.

    UsageError when standard input and output are neither one socket nor two pipes.
    """
    incoming, outgoing = _take(0), _take(1)
    kinds = [stat.S_IFMT(os.fstat(descriptor).st_mode) for descriptor in (incoming, outgoing)]
    if kinds[0] == stat.S_IFSOCK and os.path.sameopenfile(incoming, outgoing):
        os.close(outgoing)
        yield visitor(socket.socket(fileno=incoming))
    elif kinds == [stat.S_IFIFO, stat.S_IFIFO]:
        ours, theirs = socket.socketpair()
        Thread(_pump_in, "stdin", incoming, ours).start()
        out = Thread(_pump_out, "stdout", ours, outgoing)
        out.start()
        yield Visitor(theirs, "stdio")
        theirs.close()
        out.join(_LAST_REPLIES)
    else:
        raise UsageError("--stdio: standard input and output must be one socket, or two pipes")


def _take(descriptor: int) -> int:
    """Another number for the descriptor, in whose place is the null device from now on."""
    taken = os.dup(descriptor)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    os.close(null)
    return taken


# Not by splice(2), which saves the copy: on Linux 6.18 it sleeps on although the pipe is no longer empty.


def _pump_in(source: int, target: socket.socket) -> None:
    """Pass on what the client sends, until it has sent everything."""
    buffer = memoryview(bytearray(_PIECE))
    with contextlib.suppress(OSError):
        while count := os.readv(source, (buffer,)):
            target.sendall(buffer[:count])
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _pump_out(source: socket.socket, target: int) -> None:
    """Pass on what the client is sent, until the server closes or the client takes no more."""
    buffer = memoryview(bytearray(_PIECE))
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            sent = 0
            while sent < count:
                sent += os.write(target, buffer[sent:count])
    with contextlib.suppress(OSError):
        source.shutdown(socket.SHUT_RDWR)
    os.close(target)
