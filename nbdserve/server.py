"""The server: accepts clients, gives each a thread, and ends in good order."""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nbdserve.connection import Connection
from nbdserve.exports import Exports
from nbdserve.handshake import Terms
from nbdserve.listeners import Listener
from nbdserve.workers import Workers

_LOG = logging.getLogger("nbdserve")
WORKERS = 64
"""The most threads for requests that have to wait, of all clients together."""
_DRAIN = 10.0
"""Seconds that requests in flight are given when the server stops."""
_PAUSE = 0.2
"""Seconds to wait when no client can be accepted for lack of descriptors or memory."""


@dataclass(frozen=True)
class Policy:
    """Whom the server serves, and how."""

    shared: int = 0
    """Clients served at a time; more wait in the listen queue. 0 means no limit."""
    max_connections: int = 0
    """Clients connected at a time; more are turned away at once. 0 means no limit."""
    once: bool = False
    """End when the last client has gone."""
    terms: Terms = field(default_factory=Terms)


class Server:
    """Serves exports on listeners until ``stop``."""

    def __init__(self, exports: Exports, listeners: Sequence[Listener], policy: Policy) -> None:
        self._exports = exports
        self._listeners = listeners
        self._policy = policy
        self._workers = Workers(WORKERS)
        self._connections: dict[Connection, threading.Thread] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._had_client = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def stop(self) -> None:
        """Make ``run`` finish what is in flight and return. May be called from a signal handler."""
        self._stopping = True
        self._wake()

    def run(self) -> None:
        """Accept and serve clients until ``stop``, or until the last has gone if the policy says so."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            listening = False
            while not self._finished():
                if listening != self._has_room():
                    listening = not listening
                    for listener in self._listeners:
                        if listening:
                            selector.register(listener.sock, selectors.EVENT_READ, listener)
                        else:
                            selector.unregister(listener.sock)
                for key, _ in selector.select():
                    if isinstance(key.data, Listener):
                        self._accept(key.data)
                    else:
                        os.read(self._wake_read, 4096)
        self._shut_down()

    def _finished(self) -> bool:
        with self._lock:
            idle = not self._connections
        return self._stopping or (self._policy.once and self._had_client and idle)

    def _has_room(self) -> bool:
        with self._lock:
            return not self._policy.shared or len(self._connections) < self._policy.shared

    def _accept(self, listener: Listener) -> None:
        if not self._has_room():
            return
        try:
            sock, peer = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            _LOG.warning("%s: cannot accept a client: %s", listener, error.strerror or error)
            time.sleep(_PAUSE)
            return
        with self._lock:
            full = 0 < self._policy.max_connections <= len(self._connections)
        if full:
            _LOG.info("%s: turned away, %d clients are connected", peer, self._policy.max_connections)
            sock.close()
            return
        connection = Connection(
            sock,
            peer,
            self._exports,
            self._workers,
            self._policy.terms.requiring_tls() if listener.tls_required else self._policy.terms,
        )
        thread = threading.Thread(target=self._serve, args=(connection,), name=peer, daemon=True)
        with self._lock:
            self._connections[connection] = thread
        thread.start()

    def _serve(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                del self._connections[connection]
            # A client that never chose an export, such as a port scan, does not count as the last one.
            self._had_client = self._had_client or connection.agreement is not None
            self._wake()

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"!")
        except BlockingIOError:
            # The pipe is full: the loop wakes up anyway.
            pass

    def _shut_down(self) -> None:
        for listener in self._listeners:
            listener.close()
        with self._lock:
            remaining = dict(self._connections)
        for connection in remaining:
            connection.drain()
        deadline = time.monotonic() + _DRAIN
        for thread in remaining.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        for connection, thread in remaining.items():
            if thread.is_alive():
                _LOG.warning("%s: still busy after %g s, cut off", connection.peer, _DRAIN)
                connection.cut()
                thread.join(1.0)
        self._workers.close()
        if not any(thread.is_alive() for thread in remaining.values()):
            os.close(self._wake_read)
            os.close(self._wake_write)
