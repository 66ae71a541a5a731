"""One server that has the backing: connected, watched, and connected to again, by a thread of its own."""

from __future__ import annotations

import errno
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from nbdserve.client import Client, connect
from nbdserve.client.handle import Export
from nbdserve.errors import ConnectError, OperatorError
from nbdserve.threads import Thread
from nbdserve.uri import NbdUri

_LOG = logging.getLogger("nbd-overlay")

GONE = (errno.ENOTCONN, errno.ETIMEDOUT, errno.ESHUTDOWN)
"""What says that a connection, not a request, is the trouble."""

_DIAL_TIMEOUT = 5.0
"""Seconds that one attempt to reach the server may take."""
_REQUEST_TIMEOUT = 10.0
"""Seconds that the server may take for one request: one that hangs is as good as dead."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 3.0
"""Seconds between two attempts: they grow from the first to the longest."""
_LOOK = 0.5
"""Seconds between two looks at a connection that nobody uses."""


class Session:
    """Connections to one server that stand and fall together; more may come after the first.

    ``demand`` is for what a guest waits for, so that it never queues behind streaming.
    """

    def __init__(self, source: Source, first: Client) -> None:
        self.source = source
        self.demand = first
        self.clients: tuple[Client, ...] = (first,)
        self._turns = itertools.count()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether all connections still stand, as far as is known."""
        return all(client.connected for client in self.clients)

    @property
    def export(self) -> Export:
        """What the server says of the disk."""
        return self.demand.export

    def bulk(self) -> Client:
        """One of the connections for streaming, in turn."""
        bulk = self.clients[1:] or self.clients
        return bulk[next(self._turns) % len(bulk)]

    def add(self, client: Client) -> None:
        """Use this connection, too; it is closed at once if the others are."""
        with self._lock:
            if not self._closed:
                self.clients += (client,)
                return
        client.close()

    def close(self) -> None:
        """Hang up. May be called again."""
        with self._lock:
            self._closed = True
        # Each takes leave for up to a second from a server that hangs: at the same time.
        leaving = [(client, Thread(client.close, "hang up")) for client in self.clients]
        for client, thread in leaving:
            try:
                thread.start()
            except OSError:
                client.close()
        for _, thread in leaving:
            if thread.ident is not None:
                thread.join()


@dataclass(frozen=True)
class Health:
    """How a server is doing, for ``status``."""

    uri: str
    connected: bool
    connections: int
    errors: int
    latency: float
    """Seconds that small requests took lately."""
    trouble: str | None
    """Why it is not connected."""


class Source:
    """A server at a URI. ``accept`` refuses a new session by raising OSError or OperatorError.

    ``changed`` is called, in the source's thread, whenever it was connected or lost.
    """

    def __init__(
        self,
        uri: NbdUri,
        connections: int,
        accept: Callable[[Session], None],
        changed: Callable[[], None],
    ) -> None:
        self.uri = uri
        self.session: Session | None = None
        self.errors = 0
        self._connections = connections
        self._accept = accept
        self._changed = changed
        self._latency = 0.0
        self._trouble: str | None = "not connected yet"
        self._closed = False
        self._is_checked = True
        self._kick = threading.Event()
        self._thread = Thread(self._run, f"source {uri}")

    def start(self) -> None:
        """Connect, and stay connected, from now on."""
        self._thread.start()

    def retry(self) -> None:
        """Look at once whether the connection stands, and try again at once if it does not."""
        self._kick.set()

    def check_again(self) -> None:
        """Let ``accept`` look at the session once more, soon."""
        self._is_checked = False
        self._kick.set()

    def lost(self, session: Session) -> None:
        """Somebody found a session out of order: it is of no more use."""
        if self.session is session:
            self.session = None
        session.close()
        self.retry()

    def answered(self, seconds: float) -> None:
        """A small request took so long."""
        self._latency += (seconds - self._latency) / 8 if self._latency else seconds

    @property
    def rank(self) -> tuple[int, float]:
        """The healthier a server, the lower. A server that is a little slower is as good as another."""
        return self.errors, round(self._latency, 2)

    def health(self) -> Health:
        """How it is doing now."""
        session = self.session
        count = len(session.clients) if session else 0
        return Health(str(self.uri), session is not None, count, self.errors, self._latency, self._trouble)

    def close(self) -> None:
        """Hang up for good."""
        self._closed = True
        self._kick.set()
        session, self.session = self.session, None
        if session is not None:
            session.close()
        if self._thread.is_alive():
            self._thread.join(_DIAL_TIMEOUT)

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._closed:
            session = self.session
            if session is not None and session.connected:
                if not self._is_checked:
                    self._check(session)
                else:
                    self._wait(_LOOK)
                continue
            if session is not None:
                self.lost(session)
            if self._trouble is None:
                _LOG.warning("%s: the connection is lost", self.uri)
                self._trouble = "the connection is lost"
                self._changed()
            if self._connect():
                pause = _FIRST_PAUSE
            else:
                self._wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _check(self, session: Session) -> None:
        self._is_checked = True
        try:
            self._accept(session)
        except (OperatorError, OSError) as error:
            _LOG.warning("%s", (isinstance(error, OSError) and error.strerror) or error)
            self.lost(session)

    def _wait(self, seconds: float) -> None:
        self._kick.wait(seconds)
        self._kick.clear()

    def _connect(self) -> bool:
        try:
            session = self._open()
        except (OperatorError, OSError) as error:
            self._complain((isinstance(error, OSError) and error.strerror) or str(error))
            return False
        if self._closed:
            session.close()
            return False
        self.session, self._trouble = session, None
        self._changed()
        # Who waits goes on with the first. The disk does not change under us, so several connections are
        # safe where the server says that it is read-only, too.
        if session.export.multi_conn or session.export.read_only:
            self._add_connections(session)
        _LOG.info("%s: connected, %d connections", self.uri, len(session.clients))
        return True

    def _complain(self, trouble: str) -> None:
        """Say why, once for each reason."""
        if trouble != self._trouble:
            _LOG.warning("%s; trying again", trouble)
        self._trouble = trouble

    def _open(self) -> Session:
        session = Session(self, self._dial())
        try:
            began = time.monotonic()
            self._accept(session)
        except BaseException:
            session.close()
            raise
        self._latency = self._latency or time.monotonic() - began
        return session

    def _add_connections(self, session: Session) -> None:
        """Add connections as far as the server takes them: one is enough to go on with."""
        try:
            while self.session is session and len(session.clients) < self._connections:
                session.add(self._dial_again(session.export.size))
        except (OperatorError, OSError) as error:
            _LOG.info("%s; going on with %d connections", error, len(session.clients))

    def _dial_again(self, size: int) -> Client:
        client = self._dial()
        if client.export.size != size:
            client.close()
            raise ConnectError(f"{self.uri}: told another size: {size} bytes, then {client.export.size}")
        return client

    def _dial(self) -> Client:
        return connect(self.uri, timeout=_DIAL_TIMEOUT, silence=_REQUEST_TIMEOUT)
