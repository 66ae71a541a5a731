"""What lies between B and A's disks: a proxy that drops, holds, delays and cuts what goes through it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum

from tests.support.servers import Address, UnixAddress

_CHUNK = 64 << 10
_LATE = 0.15
"""Seconds by which each chunk is late while the link is slow."""


class Trouble(Enum):
    """What is wrong with the link."""

    NONE = "none"
    DROP = "drop"
    """Every connection is closed, and each new one at once."""
    HOLD_ANSWERS = "hold answers"
    """Half dead: what A says stays on the way, no end is told, until the link is well again."""
    HOLD_REQUESTS = "hold requests"
    DELAY = "delay"
    CUT = "cut"
    """The next chunk of a connection ends in its middle, and with it the connection; only once."""


@dataclass
class Link:
    """Everything that goes through the proxy. The lock guards all below it."""

    connect: Address
    affected: int = 0
    """How many connections or chunks met with trouble."""
    _trouble: Trouble = Trouble.NONE
    _open: set[socket.socket] = field(default_factory=set)
    _lock: threading.Condition = field(default_factory=threading.Condition)

    def set(self, trouble: Trouble) -> None:
        """From now on this is wrong."""
        with self._lock:
            self._trouble = trouble
            if trouble is Trouble.DROP:
                self.affected += len(self._open)
                for each in self._open:
                    with suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)
            self._lock.notify_all()

    def serve(self, client: socket.socket) -> None:
        """Pass one connection on, in threads of its own."""
        with self._lock:
            refused = self._trouble is Trouble.DROP
            self.affected += refused
        try:
            server = None if refused else self.connect.connect(600.0)
        except OSError:
            server = None
        if server is None:
            client.close()
            return
        client.settimeout(None)
        server.settimeout(None)
        with self._lock:
            self._open |= {client, server}
        for ends in ((client, server, Trouble.HOLD_REQUESTS), (server, client, Trouble.HOLD_ANSWERS)):
            threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, held_by: Trouble) -> None:
        with suppress(OSError):
            while data := source.recv(_CHUNK):
                part = self._through(data, held_by)
                target.sendall(part)
                if len(part) < len(data):
                    break
        with self._lock:
            for each in (source, target):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            self._open.discard(source)
        # The other direction may be in a call on its target still; it closes its own.
        source.close()

    def _through(self, data: bytes, held_by: Trouble) -> bytes:
        """What of a chunk comes through, after as long as that takes."""
        with self._lock:
            if self._trouble is held_by:
                self.affected += 1
                self._lock.wait_for(lambda: self._trouble is not held_by)
            is_late = self._trouble is Trouble.DELAY
            self.affected += is_late
            if self._trouble is Trouble.CUT and len(data) > 1:
                self._trouble = Trouble.NONE
                self.affected += 1
                return data[: len(data) // 2]
        if is_late:
            time.sleep(_LATE)
        return data


@contextmanager
def link(listen: Address, connect: Address) -> Iterator[Link]:
    """A proxy at one address to another, as long as the block lasts."""
    unix = isinstance(listen, UnixAddress)
    made = Link(connect)
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as listener:
        listener.bind(str(listen.path) if isinstance(listen, UnixAddress) else (listen.host, listen.port))
        listener.listen(64)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    made.serve(listener.accept()[0])

        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        try:
            yield made
        finally:
            made.set(Trouble.DROP)
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
