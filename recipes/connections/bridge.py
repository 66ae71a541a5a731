"""A monitor of this host for somebody on another: its bytes on our standard input and output.

    nbd-migrate bridge ADDRESS

ADDRESS is a socket's path, or HOST:PORT, as this host sees it. The first line that is written is a message:
``{"connected": true}``, or ``{"failed": REASON, "nobody": BOOL}``, where ``nobody`` says that nobody listens
there. What follows is the monitor's, until either side ends.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress

from nbdserve.common import standard_streams
from recipes.connections.address import host_and_port

CONNECT = 60.0
"""Seconds until who listens must have accepted; whoever called waits for less."""

PIECE = 1 << 16
"""Bytes that are passed on at once."""


def main(arguments: list[str]) -> int:
    """Pass bytes on; return 0, or 1 when there is nobody at the address."""
    standard_streams.prepare()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    [address] = arguments
    try:
        peer = connect(address)
    except ValueError:
        tell({"failed": f"{address!r} is no monitor: write PATH or HOST:PORT", "nobody": False})
        return 1
    except OSError as error:
        nobody = isinstance(error, ConnectionRefusedError | FileNotFoundError)
        tell({"failed": reason_of(error), "nobody": nobody})
        return 1
    with peer:
        tell({"connected": True})
        pass_on(peer)
    return 0


def connect(address: str) -> socket.socket:
    """Connect to a monitor. Raises OSError."""
    if not address.startswith("/"):
        made = socket.create_connection(host_and_port(address), CONNECT)
    else:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The kernel's own limit: with Python's a full queue is an error at once.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(CONNECT), 0))
            made.connect(address)
        except BaseException:
            made.close()
            raise
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 0))
    made.settimeout(None)
    return made


def reason_of(error: OSError) -> str:
    """Return why nobody was reached, on one line."""
    if isinstance(error, TimeoutError | BlockingIOError):
        return os.strerror(errno.ETIMEDOUT)
    return " ".join((error.strerror or str(error)).split())


def tell(message: dict[str, object]) -> None:
    """Write a message, for somebody who may have gone."""
    with suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def pass_on(peer: socket.socket, *also: socket.socket) -> None:
    """Pass everything on between standard input and output and the peer, until either ends.

    It ends with whatever comes from one of ``also``, too, or with their ends.
    """
    # Who has gone is noticed by the end of what he says.
    with suppress(OSError):
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(peer, select.POLLIN)
        ends = {each.fileno() for each in also}
        for end in ends:
            poll.register(end, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd in ends:
                    return
                data = os.read(fd, PIECE)
                if not data:
                    return
                if fd:
                    write(data)
                else:
                    peer.sendall(data)


def write(data: bytes) -> None:
    """Write all of it to standard output. Raises OSError."""
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
