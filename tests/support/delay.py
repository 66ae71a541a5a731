"""A link with a long way: ``python -m tests.support.delay LISTEN CONNECT SECONDS [COUNT]``.

Passes what comes on one Unix socket on to another, the answers later by so many seconds, at any rate and for
any number of connections. When it is told to end it writes how many bytes of answers it passed to COUNT.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue

from tests.support.processes import Argument, Process, listens
from tests.support.servers import UnixAddress, fresh_path

_CHUNK = 256 << 10
_WAITING = 512
"""Chunks on their way on one connection: more than the bandwidth of memory fills in 0.1 s."""


class Link:
    """Everything that goes through the proxy."""

    def __init__(self, connect: str, seconds: float) -> None:
        self._connect = connect
        self._seconds = seconds
        self.passed = 0

    def serve(self, client: socket.socket) -> None:
        """Pass one connection on, in threads of its own."""
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._connect)
        way: Queue[tuple[float, bytes]] = Queue(_WAITING)
        for work in (
            lambda: self._pass(client, server),
            lambda: self._depart(server, way),
            lambda: self._arrive(client, way),
        ):
            threading.Thread(target=work, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(_CHUNK):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _depart(self, server: socket.socket, way: Queue[tuple[float, bytes]]) -> None:
        data = b"?"
        while data:
            try:
                data = server.recv(_CHUNK)
            except OSError:
                data = b""
            way.put((time.monotonic() + self._seconds, data))

    def _arrive(self, client: socket.socket, way: Queue[tuple[float, bytes]]) -> None:
        with suppress(OSError):
            while True:
                due, data = way.get()
                if (early := due - time.monotonic()) > 0:
                    time.sleep(early)
                if not data:
                    break
                client.sendall(data)
                self.passed += len(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Serve until SIGTERM."""
    listen, connect, seconds, *count = sys.argv[1:]
    link = Link(connect, float(seconds))
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(listen)
        listener.listen(64)
        try:
            while True:
                link.serve(listener.accept()[0])
        finally:
            for path in count:
                Path(path).write_text(f"{link.passed}\n")


@contextmanager
def delayed(
    address: UnixAddress, seconds: float, directory: Path, count: Path | None = None
) -> Iterator[UnixAddress]:
    """The address behind a link that delays answers; what it passed is in ``count`` at the end."""
    near = UnixAddress(fresh_path(directory, "delay", ".sock"))
    module: list[Argument] = [sys.executable, "-m", "tests.support.delay"]
    argv = [*module, near.path, address.path, str(seconds)]
    argv += [] if count is None else [count]
    with Process(argv, fresh_path(directory, "delay", ".log"), cwd=Path(__file__).parents[2]) as process:
        process.wait_for(lambda: listens(near.path), "the link's socket")
        yield near
        process.terminate()


if __name__ == "__main__":
    main()
