"""What stands in for the two QEMUs and for nbd-overlay: ``python -m tests.bench.channel.loads ROLE ...``.

``feed`` writes RAM, zeros, to its standard output or to a TCP port, as fast as that takes them. ``sink``
accepts one connection and takes what comes; ``count`` takes what comes on standard input; ``read`` reads a
disk over and over, with many requests under way. These three count bytes in a file that they share.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

from nbdserve.client.libnbd import nbd
from tests.support.processes import Argument, dying_with_parent
from tests.support.tls import client_context
from tests.support.vms import ROOT

PIECE = 256 << 10
"""Bytes of a request."""
DEPTH = 16
"""Requests that are under way."""
_WRITTEN = 64 << 10
"""Bytes of RAM that are written with one system call."""
_NUMBER = struct.Struct("=q")


class Load:
    """A process in one of the roles, which ends with this one."""

    def __init__(
        self,
        directory: Path,
        role: str,
        *words: Argument,
        stdin: int | None = None,
        stdout: int | None = None,
    ) -> None:
        path = directory / f"{role}.count"
        path.write_bytes(bytes(_NUMBER.size))
        with path.open("rb") as file:
            self._counter = mmap.mmap(file.fileno(), _NUMBER.size, access=mmap.ACCESS_READ)
        argv: list[Argument] = [sys.executable, "-m", "tests.bench.channel.loads", role, path, *words]
        self._process = subprocess.Popen(
            [*dying_with_parent(signal.SIGKILL), *(os.fspath(word) for word in argv)],
            cwd=ROOT,
            stdin=stdin,
            stdout=stdout,
        )
        self.pid = self._process.pid

    @property
    def moved(self) -> int:
        """How many bytes have come."""
        return int(_NUMBER.unpack(self._counter[:])[0])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Counter:
    """The file in which a role counts."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _NUMBER.size)
        self._count = 0

    def add(self, count: int) -> None:
        """So many bytes more."""
        self._count += count
        _NUMBER.pack_into(self._map, 0, self._count)


def feed(port: str = "", certificates: str = "") -> None:
    """Write RAM for ever: to a port, over TLS with certificates, or to standard output."""
    zeros = bytes(_WRITTEN)
    if not port:
        while True:
            os.write(1, zeros)
    sock = _connected(int(port))
    if certificates:
        sock = client_context(Path(certificates)).wrap_socket(sock, server_hostname="localhost")
    while True:
        sock.sendall(zeros)


def _connected(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.01)


def sink(counter: Counter, place: str, certificates: str = "") -> None:
    """Accept one connection, at a port or a path, and take what comes."""
    listener = socket.socket(socket.AF_INET if place.isdecimal() else socket.AF_UNIX)
    listener.bind(("127.0.0.1", int(place)) if place.isdecimal() else place)
    listener.listen()
    peer, _ = listener.accept()
    if certificates:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"{certificates}/server-cert.pem", f"{certificates}/server-key.pem")
        peer = context.wrap_socket(peer, server_side=True)
    buffer = bytearray(1 << 20)
    while count := peer.recv_into(buffer):
        counter.add(count)


def count(counter: Counter) -> None:
    """Take what comes on standard input."""
    buffer = bytearray(1 << 20)
    while length := os.readv(0, [buffer]):
        counter.add(length)


def read(counter: Counter, uri: str) -> None:
    """Read a disk over and over."""
    handle = nbd.NBD()
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(uri)
    at, size = 0, handle.get_size()
    # Used again and again: the binding of Debian 12 never frees one.
    free, flying = deque(nbd.Buffer(PIECE) for _ in range(DEPTH)), deque[tuple[int, nbd.Buffer]]()
    while True:
        while free:
            buffer = free.popleft()
            flying.append((handle.aio_pread(buffer, at), buffer))
            at = (at + PIECE) % size
        while not handle.aio_command_completed(flying[0][0]):
            handle.poll(-1)
        free.append(flying.popleft()[1])
        counter.add(PIECE)


def main() -> None:
    """Be one of them, until it is killed or the other end has gone."""
    role, path, *words = sys.argv[1:]
    match role:
        case "feed":
            feed(*words)
        case "sink":
            sink(Counter(path), *words)
        case "count":
            count(Counter(path))
        case _:
            read(Counter(path), *words)


if __name__ == "__main__":
    try:
        main()
    except OSError:
        # What was measured is over.
        sys.exit(1)
