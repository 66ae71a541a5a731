"""The wire between the two hosts, as long and as narrow as is wanted: ``python -m tests.bench.migrate.link``.

A proxy between two network namespaces. All connections share the rate of each direction, in the order in
which their bytes come; what has left arrives half a round trip later. It is a good network: it loses nothing,
has a short queue, as who sends too much is held back by its own socket, and lets everybody send at full speed
from the beginning (TCP's slow start and its windows are not imitated).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue

CHUNK = 128 << 10
"""Bytes that are passed on at a time: a millisecond of a Gbit/s."""

QUEUE = 0.004
"""Seconds for which bytes may wait to leave, before their sender is held back."""

BUFFER = 512 << 10
"""Bytes of a connection that the kernel holds before the proxy."""

_AGAIN = 0.02
"""Seconds between two attempts to connect to a server that is not there yet."""

_NEW_NETWORK = 0x40000000
"""CLONE_NEWNET of setns(2)."""


@dataclass(frozen=True)
class Passage:
    """A port that can be reached from the other host.

    listen, connect    names of network namespaces: where the proxy listens, and where the server is
    address, port      of the server; the proxy listens at the same ones in its own namespace
    source             address from which the server sees its clients come
    """

    listen: str
    connect: str
    address: str
    port: int
    source: str


class Direction:
    """One half of the wire."""

    def __init__(self, rate: float, delay: float) -> None:
        """``rate`` is in bytes per second, ``delay`` in seconds."""
        self._rate, self._delay = rate, delay
        self._lock = threading.Lock()
        self._free = 0.0
        self.passed = 0

    def send(self, count: int) -> tuple[float, float]:
        """Send so many bytes: when the last of them leaves, and when it arrives (of time.monotonic)."""
        with self._lock:
            # What this process was late for is made up for, as long as it is short: a wire is never late.
            self._free = max(time.monotonic() - QUEUE, self._free) + count / self._rate
            self.passed += count
            return self._free, self._free + self._delay

    @property
    def room(self) -> int:
        """How many chunks of a connection may be on their way: what the wire holds, and some more."""
        return int(self._rate * self._delay / CHUNK) * 4 + 64


def pass_on(source: socket.socket, target: socket.socket, way: Direction) -> None:
    """Carry what comes from ``source`` to ``target``, until its end, in two threads."""
    queue: Queue[tuple[float, bytes]] = Queue(way.room)

    def depart() -> None:
        data = b"?"
        while data:
            try:
                data = source.recv(CHUNK)
            except OSError:
                data = b""
            leaves, arrives = way.send(len(data))
            queue.put((arrives, data))
            _sleep_until(leaves - QUEUE)

    def arrive() -> None:
        while (came := queue.get())[1]:
            _sleep_until(came[0])
            with suppress(OSError):
                target.sendall(came[1])
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    for work in (depart, arrive):
        threading.Thread(target=work, daemon=True).start()


def _sleep_until(moment: float) -> None:
    if (early := moment - time.monotonic()) > 0:
        time.sleep(early)


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Let this thread make sockets in a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as own, open(f"/run/netns/{namespace}") as other:
        _enter(libc, other.fileno())
        try:
            yield
        finally:
            _enter(libc, own.fileno())


def _enter(libc: ctypes.CDLL, fd: int) -> None:
    if libc.setns(fd, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def serve(passage: Passage, out: Direction, back: Direction) -> None:
    """Listen for ever; ``out`` is the direction to the server."""
    with inside(passage.listen):
        listener = socket.socket(socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    listener.bind((passage.address, passage.port))
    listener.listen(64)

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            threading.Thread(target=join, args=(client,), daemon=True).start()

    def join(client: socket.socket) -> None:
        server = connected(passage)
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pass_on(client, server, out)
        pass_on(server, client, back)

    threading.Thread(target=accept, daemon=True).start()


def connected(passage: Passage) -> socket.socket:
    """Connect to the server; who has come before it waits, as this wire cannot say that nobody is there."""
    while True:
        with inside(passage.connect):
            server = socket.socket(socket.AF_INET)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        server.bind((passage.source, 0))
        try:
            server.connect((passage.address, passage.port))
        except OSError:
            server.close()
            time.sleep(_AGAIN)
            continue
        return server


def arguments(rate: float, trip: float, count: Path, passages: list[Passage]) -> list[str]:
    """The command line of a proxy of ``rate`` bytes per second, with a round trip of ``trip`` seconds."""
    told = json.dumps([asdict(each) for each in passages])
    return [sys.executable, "-m", "tests.bench.migrate.link", str(rate), str(trip), str(count), told]


def main() -> None:
    """Serve until SIGTERM, then write to a file how many bytes have passed, both directions together."""
    rate, trip, count, told = sys.argv[1:]
    passages = [Passage(**each) for each in json.loads(told)]
    # One direction for each namespace that is connected to.
    to = {each.connect: Direction(float(rate), float(trip) / 2) for each in passages}
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit())
    for each in passages:
        serve(each, to[each.connect], to[each.listen])
    print("ready", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        Path(count).write_text(f"{sum(way.passed for way in to.values())}\n")


if __name__ == "__main__":
    main()
