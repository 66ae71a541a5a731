"""nbdserve's server in the test's own process: for disks that do what no real one can be made to do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nbdserve.backends.base import Buffer
from nbdserve.connection.listeners import Listener, listen_tcp, listen_unix
from nbdserve.connection.policy import Policy
from nbdserve.exports.served_exports import Export, Exports
from nbdserve.protocol.constants import Command
from nbdserve.service.server import Server
from tests.support.memory import MemoryBackend
from tests.support.servers import Address, TcpAddress, UnixAddress, fresh_path


class GatedBackend(MemoryBackend):
    """A disk on which writes that start with ``slow`` wait until ``gate`` opens.

    ``local`` says in whose hands they wait: the connection's own thread's, or a worker's.
    """

    def __init__(self, size: int, *, local: bool, slow: bytes = b"old") -> None:
        super().__init__(size)
        self._local = local
        self._slow = slow
        self.gate = threading.Event()
        self.waiting = 0
        self._lock = threading.Lock()

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Store the data, at once or when the gate is open."""
        if bytes(data[: len(self._slow)]) == self._slow:
            with self._lock:
                self.waiting += 1
            assert self.gate.wait(300), "nobody has opened the gate"
            with self._lock:
                self.waiting -= 1
        super().write(offset, data, fua)

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """Everything, or nothing."""
        return self._local


@contextmanager
def running(
    exports: Exports, directory: Path, policy: Policy | None = None, *, tcp: bool = False
) -> Iterator[tuple[Server, Address]]:
    """A server of these exports until the block ends."""
    address, listener = _listen(directory, tcp)
    server = Server(exports, [listener], policy or Policy())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server, address
    finally:
        server.stop()
        thread.join(120)
        assert not thread.is_alive()


def one_export(backend: MemoryBackend) -> Exports:
    """The default export, made of this disk."""
    return Exports([Export("", backend)])


def _listen(directory: Path, tcp: bool) -> tuple[Address, Listener]:
    if tcp:
        listener = listen_tcp("127.0.0.1", 0)[0]
        return TcpAddress("127.0.0.1", listener.sock.getsockname()[1]), listener
    path = fresh_path(directory, "server", ".sock")
    return UnixAddress(path), listen_unix(str(path))
