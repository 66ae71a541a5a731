"""One client of a tunnel's end on this host (listen.py): its bytes on our standard input and output.

    nbd-migrate take SOCKET NUMBER

The first line that is written is a message, as that of bridge.py.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from nbdserve.common import standard_streams
from recipes.connections.bridge import connect, pass_on, reason_of, tell
from recipes.connections.listen import control_of


def main(arguments: list[str]) -> int:
    """Pass bytes on; return 0, or 1 when there is no such client."""
    standard_streams.prepare()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    path, which = arguments
    try:
        end = connect(control_of(path))
    except OSError as error:
        tell({"failed": reason_of(error)})
        return 1
    with end:
        client = taken(end, which)
        if client is None:
            tell({"failed": f"{path} has no client {which}"})
            return 1
        with client:
            tell({"connected": True})
            # When that end has lost its place, whoever is at the other end of this is gone.
            pass_on(client, end)
    return 0


def taken(end: socket.socket, which: str) -> socket.socket | None:
    """Return a client that waits; None where there is none of this number."""
    try:
        end.sendall(f"take {which}\n".encode())
        _, descriptors, _, _ = socket.recv_fds(end, 1, 1)
    except OSError:
        return None
    for each in descriptors[1:]:
        os.close(each)
    return socket.socket(fileno=descriptors[0]) if descriptors else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
