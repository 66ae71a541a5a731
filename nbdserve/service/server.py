"""The server: accepts clients, gives each a thread, and ends in good order."""

from __future__ import annotations

import logging
import selectors
import signal
import socket
import time
from collections import Counter
from collections.abc import Sequence

from nbdserve.common.logs import ClientLog
from nbdserve.common.threads import Thread
from nbdserve.connection.accepting import ACCEPT_PAUSE, AcceptFailures
from nbdserve.connection.client_connection import Connection, Shared
from nbdserve.connection.connected_clients import SILENCE, Clients
from nbdserve.connection.listeners import Listener, Visitor
from nbdserve.connection.policy import Policy
from nbdserve.exports.served_exports import Exports
from nbdserve.service.notify import ServiceManager
from nbdserve.transmission.busy_polling import Watch
from nbdserve.transmission.traffic import Traffic
from nbdserve.transmission.workers import Budget, Pools

_LOG = logging.getLogger("nbdserve")
WORKERS = 64
"""The most threads for requests that have to wait, of all clients of an export together."""
_DRAIN = 10.0
"""Seconds that requests in flight are given when the server stops."""
_FAREWELL = 1.0
"""Seconds that those are given together who have been cut off."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Server:
    """Serves exports on listeners until ``stop``.

    Where somebody else accepts clients, it ``expects_visitors``, and goes on while it has neither.
    """

    def __init__(
        self,
        exports: Exports,
        listeners: Sequence[Listener],
        policy: Policy,
        manager: ServiceManager | None = None,
        *,
        expects_visitors: bool = False,
    ) -> None:
        self.exports = exports
        self.clients: Clients[Connection] = Clients(self._wake)
        self.memory = Budget(policy.request_memory)
        self.accepted = 0
        """Clients that were let in so far."""
        self.turned_away: Counter[str] = Counter()
        """Clients that were not, by reason."""
        self._listeners = listeners
        self._expects_visitors = expects_visitors
        self._policy = policy
        self._manager = manager or ServiceManager({})
        self._pools = Pools(WORKERS, self.memory, policy.worker_idle)
        self._shared = Shared(exports, self.clients, self._pools, Watch(policy.busy_poll), policy.stall)
        self._accept_failures = AcceptFailures()
        self._stopping = False
        # By time.monotonic(); 0 when there is room to haggle, or somebody has since left or shaken hands.
        self._crowded_until = 0.0
        self._had_client = False
        self._on_signals = False
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._bell.setblocking(False)

    def stop(self) -> None:
        """Make ``run`` finish what is in flight and return. May be called from any thread."""
        self._stopping = True
        self._wake()

    def stop_on_signals(self) -> None:
        """From now on SIGTERM, SIGINT and SIGHUP stop the server; its ``run`` is the main thread's."""
        # Python's handlers run when the main thread comes back from waiting, and a signal that arrives just
        # before it waits, or in another thread, does not end the wait: so the arrival rings the bell itself.
        signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        self._on_signals = True
        for number in _SIGNALS:
            signal.signal(number, lambda _number, _frame: self.stop())

    def run(self) -> None:
        """Accept and serve clients until ``stop``, or until the last has gone if the policy says so."""
        watchdog = self._manager.watchdog
        with selectors.DefaultSelector() as selector:
            selector.register(self._alarm, selectors.EVENT_READ)
            listening = False
            while not self._finished():
                if listening != self._has_room():
                    listening = not listening
                    for listener in self._listeners:
                        if listening:
                            selector.register(listener.sock, selectors.EVENT_READ, listener)
                        else:
                            selector.unregister(listener.sock)
                for key, _ in selector.select(self._seconds_left()):
                    if isinstance(key.data, Listener):
                        self._accept(key.data)
                    else:
                        self._alarm.recv(4096)
                        self._crowded_until = 0.0
                watchdog.beat()
        self._manager.tell("STOPPING=1")
        self._shut_down()

    def welcome(self, visitor: Visitor, *, tls_required: bool = False) -> None:
        """Serve a client that is connected; OSError when there is no thread to do that."""
        terms = self._policy.terms.requiring_tls() if tls_required else self._policy.terms
        traffic = Traffic(timed=self._policy.timed)
        connection = Connection(visitor, self._shared, terms, traffic, self.accepted)
        thread = Thread(self._serve, visitor.name, connection)
        self.clients.add(connection, thread)
        try:
            thread.start()
        except OSError:
            self.clients.remove(connection)
            raise
        self.accepted += 1

    def _seconds_left(self) -> float | None:
        """How long to wait for something to happen, in seconds; None for ever."""
        limits = [self._manager.watchdog.seconds_left()]
        if self._crowded_until:
            # It may have come meanwhile.
            limits.append(max(0.0, self._crowded_until - time.monotonic()))
        return min((limit for limit in limits if limit is not None), default=None)

    def _finished(self) -> bool:
        if self._stopping:
            return True
        # With no listener nobody can come any more.
        ends = not (self._listeners or self._expects_visitors) or (self._policy.once and self._had_client)
        return ends and not self.clients

    def _has_room(self) -> bool:
        if time.monotonic() < self._crowded_until:
            return False
        self._crowded_until = 0.0
        return not self._policy.shared or len(self.clients) < self._policy.shared

    def _accept(self, listener: Listener) -> None:
        if not self._has_room() or not self._make_room_to_haggle():
            return
        try:
            visitor = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            if self._accept_failures.is_news(error):
                _LOG.warning("%s: cannot accept a client: %s", listener, error.strerror or error)
            time.sleep(ACCEPT_PAUSE)
            return
        if visitor.host is not None and not self._policy.allow.admits(visitor.host):
            self._turn_away(visitor, "not allowed", "turned away: its address is not in any --allow")
        elif 0 < self._policy.max_connections <= len(self.clients):
            limit = self._policy.max_connections
            self._turn_away(visitor, "too many", f"turned away: {limit} clients are connected")
        else:
            try:
                self.welcome(visitor, tls_required=listener.tls_required)
            except OSError as error:
                self._turn_away(visitor, "no thread", f"turned away: {error.strerror}", logging.WARNING)

    def _make_room_to_haggle(self) -> bool:
        """Whether one more client may haggle.

        A client needs milliseconds to choose an export. Where many do not choose, one of those that had their
        time goes; the next one comes in when it has gone.
        """
        if self.clients.haggling < self._policy.max_handshakes:
            return True
        first = self.clients.who_gives_way()
        if first is None:
            return True
        client, seconds = first
        if not seconds:
            client.cut("cut off: it was slow to choose an export, and others wait to")
            self.turned_away["slow to choose"] += 1
            # It is gone at once, unless it is stuck, in a file system perhaps: then it keeps no place.
            self.clients.discount(client)
        self._crowded_until = time.monotonic() + (seconds or SILENCE)
        return False

    def _turn_away(self, visitor: Visitor, reason: str, message: str, level: int = logging.INFO) -> None:
        self.turned_away[reason] += 1
        ClientLog(visitor.name).log(level, "%s", message)
        visitor.sock.close()

    def _serve(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            # A client that never chose an export, such as a port scan, does not count as the last one.
            self._had_client = self._had_client or connection.agreement is not None
            self.clients.remove(connection)

    def _wake(self) -> None:
        try:
            self._bell.send(b"!")
        except OSError:
            # It has rung so often that the loop wakes up anyway, or the loop has ended.
            pass

    def _shut_down(self) -> None:
        for listener in self._listeners:
            listener.close()
        self.clients.close()
        remaining = self.clients.everyone()
        for connection in remaining:
            connection.drain()
        deadline = time.monotonic() + _DRAIN
        for thread in remaining.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        busy = {connection: thread for connection, thread in remaining.items() if thread.is_alive()}
        for connection in busy:
            connection.cut(f"cut off: still busy {_DRAIN:g} s after the server was told to stop")
        deadline = time.monotonic() + _FAREWELL
        for thread in busy.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        self._pools.close()
        if self._on_signals:
            signal.set_wakeup_fd(-1)
        self._alarm.close()
        self._bell.close()
