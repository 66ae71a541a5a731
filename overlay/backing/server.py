"""One server that has the backing: connected, watched, and connected to again, by a thread of its own."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from nbdserve.client import Target, connect
from nbdserve.client.dial import Pauses
from nbdserve.client.reconnect import DIAL_TIMEOUT, Dialler, Fault, fault_of
from nbdserve.common.errors import OperatorError, reason_of
from nbdserve.common.threads import Thread
from overlay.backing.connections import LOOK, Session
from overlay.backing.reads import new_pace

_LOG = logging.getLogger("nbd-overlay")

_HUNG = 10.0
"""Seconds of silence after which another server is asked, where there is one that is no worse."""
_LONGEST_PAUSE = 3.0
"""Seconds between two attempts to connect, at most."""
_APART = 0.1
"""Seconds between two connections, at least, however soon the first is lost."""
_HALF_LIFE = 60.0
"""Seconds after which an error counts half as much when servers are compared."""


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
    rate: float
    """Bytes a second that answers came with lately; 0 if there were none."""
    slow: bool
    """Answers take so long that shorter ones are asked for."""
    quiet: float
    """Seconds for which nothing has come although something is asked for; 0 if nothing is."""


class Source:
    """A server at a URI. ``accept`` refuses a session by raising OSError or OperatorError.

    While it waits for the server it calls the function that it is given, and lets what that raises pass.
    ``silence`` is for how many seconds the server may say nothing. ``changed`` is called, in the source's
    thread, whenever it was connected or lost; ``has_another`` tells whether another server is no worse.

    Its own thread dials, asks ``accept``, and waits. What others call returns at once but for :meth:`lost`
    and :meth:`close`, which take leave of the server; none of them holds ``_lock`` meanwhile.
    """

    def __init__(
        self,
        uri: Target,
        connections: int,
        silence: float,
        accept: Callable[[Session, Callable[[], None]], None],
        changed: Callable[[], None],
        has_another: Callable[[Source], bool],
    ) -> None:
        self.uri = uri
        self.session: Session | None = None
        self.errors = 0
        self.pace = new_pace()
        self._connections = connections
        self._accept = accept
        self._changed = changed
        self._has_another = has_another
        self._dialler = Dialler(
            lambda seconds: connect(uri, timeout=seconds, silence=silence), longest=silence
        )
        self._pauses = Pauses(_LONGEST_PAUSE)
        self._latency = 0.0
        self._trouble: str | None = "not connected yet"
        self._distrusted = False
        self._blame, self._blamed = 0.0, time.monotonic()
        self._lock = threading.Lock()
        """Held for moments only, with no other under it: a session is set only while this is not closed."""
        self._closed = False
        self._is_told = False
        """Whether ``changed`` was called for a session that is used."""
        self._is_checked = True
        self._kick = threading.Event()
        self._not_before = 0.0
        """When the next connection may be made, by time.monotonic()."""
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
        with self._lock:
            if self.session is session:
                self.session = None
        session.close()
        self.retry()

    def failed(self) -> None:
        """It could not do what it was asked."""
        self.errors += 1
        with self._lock:
            self._blame, self._blamed = self._blame_now() + 1, time.monotonic()

    def distrust(self, session: Session, why: str) -> None:
        """It broke the protocol: nothing that it says counts, until the operator says otherwise."""
        with self._lock:
            is_news, self._distrusted = not self._distrusted, True
        if is_news:
            self.failed()
            self._trouble = why
            _LOG.error("%s: the server is not used any more", why)
        self.lost(session)

    def trust(self) -> None:
        """The operator says that it is in order again."""
        self._distrusted = False
        self.retry()

    @property
    def is_distrusted(self) -> bool:
        """Tell whether it is not used any more."""
        return self._distrusted

    def answered(self, seconds: float) -> None:
        """A small request took so long."""
        self._latency += (seconds - self._latency) / 8 if self._latency else seconds

    @property
    def rank(self) -> tuple[int, float]:
        """Rank the server: the healthier, the lower. One that is a little slower is as good as another.

        Errors count less the longer ago they were: one bad sector says nothing of the rest for ever.
        """
        return round(self._blame_now()), round(self._latency, 2)

    def health(self) -> Health:
        """Tell how it is doing now."""
        session = self.session
        return Health(
            uri=str(self.uri),
            connected=session is not None,
            connections=len(session.clients) if session else 0,
            errors=self.errors,
            latency=self._latency,
            trouble=self._trouble,
            rate=self.pace.rate,
            slow=self.pace.is_slow,
            quiet=session.quiet if session else 0.0,
        )

    def close(self) -> None:
        """Hang up for good."""
        with self._lock:
            self._closed = True
            session, self.session = self.session, None
        self._kick.set()
        if session is not None:
            session.close()
        if self._thread.is_alive():
            self._thread.join(DIAL_TIMEOUT)

    def _blame_now(self) -> float:
        return float(self._blame * 0.5 ** ((time.monotonic() - self._blamed) / _HALF_LIFE))

    def _run(self) -> None:
        while not self._closed:
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - it is told, and tried again
                self._complain(f"{self.uri}: {error!r}")
                session = self.session
                if session is not None:
                    self.lost(session)
                self._wait(_LONGEST_PAUSE)

    def _look(self) -> None:
        """Watch the connection for a while, or try to make one."""
        session = self.session
        if session is not None and session.connected:
            if not self._is_checked:
                self._check(session)
            else:
                self._wait(LOOK)
                self._watch(session)
            return
        if session is not None:
            self.lost(session)
        if self._is_told:
            self._is_told = False
            if self._trouble is None:
                _LOG.warning("%s: the connection is lost", self.uri)
                self._trouble = "the connection is lost"
            self._changed()
        if self._distrusted:
            self._wait(_LONGEST_PAUSE)
        elif self._connect():
            self._pauses.begin_anew()
        else:
            self._wait(self._pauses.next)
            self._pauses.grow()

    def _watch(self, session: Session) -> None:
        try:
            self._require_hope(session)
        except OSError as error:
            self._refuse(session, error)

    def _require_hope(self, session: Session) -> None:
        """OSError when a server that says nothing should not be waited for any more."""
        if self._closed:
            raise OSError(errno.ENOTCONN, f"{self.uri}: closed")
        if session.quiet >= _HUNG and self._has_another(self):
            self.failed()
            raise OSError(errno.ETIMEDOUT, f"{self.uri}: no answer for {_HUNG:g} s: another server is asked")

    def _check(self, session: Session) -> None:
        self._is_checked = True
        try:
            self._accept(session, lambda: self._require_hope(session))
        except (OperatorError, OSError) as error:
            self._refuse(session, error)

    def _refuse(self, session: Session, error: OperatorError | OSError) -> None:
        """What was found out about a server keeps it from being used."""
        if isinstance(error, OSError) and fault_of(error) is Fault.SERVER:
            self.distrust(session, reason_of(error))
            return
        self._complain(reason_of(error))
        self.lost(session)

    def _wait(self, seconds: float) -> None:
        self._kick.wait(seconds)
        self._kick.clear()

    def _connect(self) -> bool:
        # A server that hangs up on what it is asked for is asked again, but not thousands of times a second.
        time.sleep(max(0.0, self._not_before - time.monotonic()))
        self._not_before = time.monotonic() + _APART
        try:
            session = Session(self, self._dialler.connect())
        except (OperatorError, OSError) as error:
            self._complain(reason_of(error))
            return False
        try:
            began = time.monotonic()
            self._accept(session, lambda: self._require_hope(session))
        except (OperatorError, OSError) as error:
            self._refuse(session, error)
            return False
        except BaseException:
            session.close()
            raise
        self._latency = self._latency or time.monotonic() - began
        if not self._use(session):
            session.close()
            return False
        self._is_told = True
        self._changed()
        # Who waits goes on with the first. The disk does not change under us, so several connections are
        # safe where the server says that it is read-only, too.
        if session.export.multi_conn or session.export.read_only:
            self._add_connections(session)
        _LOG.info("%s: connected, %d connections", self.uri, len(session.clients))
        return True

    def _use(self, session: Session) -> bool:
        """Let others use a session; False if the source has been closed meanwhile."""
        with self._lock:
            if self._closed:
                return False
            self.session, self._trouble = session, None
            return True

    def _complain(self, trouble: str) -> None:
        """Say why, once for each reason."""
        if trouble != self._trouble and not self._closed:
            _LOG.warning("%s; trying again", trouble)
        self._trouble = trouble

    def _add_connections(self, session: Session) -> None:
        """Add connections as far as the server takes them: one is enough to go on with."""
        try:
            while self.session is session and len(session.clients) < self._connections:
                session.add(self._dialler.connect())
        except (OperatorError, OSError) as error:
            _LOG.info("%s; going on with %d connections", error, len(session.clients))
