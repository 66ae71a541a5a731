"""A wire of the loopback, narrow and long: ``python -m tests.bench.channel.wire RATE TRIP PASSAGE...``.

A passage is ``LISTEN:CONNECT:to-b`` or ``:to-a``, ports and where the server is. All share the wire, as in
tests/bench/migrate/link.py.
"""

from __future__ import annotations

import socket
import sys
import threading
import time

from tests.bench.migrate.link import Direction, pass_on

_BUFFER = 128 << 10
"""Bytes of a connection that the kernel holds before the wire, about: they delay all that comes behind."""


def serve(listen: int, connect: int, out: Direction, back: Direction) -> None:
    """Pass on whoever connects, for ever."""
    listener = socket.create_server(("127.0.0.1", listen))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            while server.connect_ex(("127.0.0.1", connect)):
                time.sleep(0.02)
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pass_on(client, server, out)
            pass_on(server, client, back)

    threading.Thread(target=accept, daemon=True).start()


def main() -> None:
    """Serve until this is killed."""
    rate, trip = map(float, sys.argv[1:3])
    to = {name: Direction(rate, trip / 2) for name in ("to-a", "to-b")}
    for each in sys.argv[3:]:
        listen, connect, name = each.split(":")
        out = to.pop(name)
        back = next(iter(to.values()))
        to[name] = out
        serve(int(listen), int(connect), out, back)
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
