"""An export that other exports are made of: reached again when its connection is lost, used by many threads.

A request that a lost connection leaves unanswered is sent again on the next one, for as long as patience
lasts; all requests of NBD may be repeated. What was acknowledged, but not flushed, may be gone when the
server comes back: then a flush fails, once, or everything does; nothing is passed over in silence.
"""

from __future__ import annotations

import errno
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from enum import Enum, auto
from typing import Concatenate, ParamSpec, TypeVar

from nbdserve.client.dial import Pauses
from nbdserve.client.export import Export
from nbdserve.client.pipeline import Client
from nbdserve.client.reconnect import Connections, Dialler, Fault, fault_of
from nbdserve.common.errors import OperatorError

_LOG = logging.getLogger("nbdserve")

PATIENCE = 10.0
"""Seconds for which requests wait for a lost server, unless the operator says otherwise."""

_LONGEST_DIAL = 60.0
"""Seconds that a server ever gets to take a connection, or to go on talking until it is made."""
_FIRST_DIAL_TIMEOUT = 20.0
"""Those that it gets at the start at least: no other attempt follows."""
_LONGEST_PAUSE = 1.0
"""Seconds between two attempts to connect, at most."""

T = TypeVar("T")
P = ParamSpec("P")
Start = Callable[Concatenate[Client, P], Future[T]]
"""A method of Client that starts a request."""


class Fate(Enum):
    """What became of acknowledged writes that were not flushed when the connection was lost."""

    SAFE = auto()
    UNKNOWN = auto()
    LOST = auto()


class Session(Connections):
    """Connections to one export, and what their loss has meant."""

    def __init__(self, first: Client) -> None:
        super().__init__(first)
        self.fate: Fate | None = None
        """Known when it has been lost and that has been accounted for."""

    def next(self) -> Client:
        """Take one connection after the other."""
        return self.clients[next(self.turns) % len(self.clients)]


class Upstream:
    """An export of another server. ``dial`` connects to it, within the seconds that it is given.

    ``patience`` is for how many seconds a request waits for a lost server. ``fate`` is asked after each loss.
    Raises ConnectError when the server cannot be reached now.

    Safe for several threads. ``_renewing`` is held by the one that connects again, for as long as that takes;
    the others wait for it no longer than their patience lasts. ``_books``, taken under it or alone, is held
    for moments only.
    """

    def __init__(
        self,
        name: str,
        dial: Callable[[float], Client],
        *,
        connections: int = 1,
        patience: float = PATIENCE,
        fate: Callable[[], Fate] = lambda: Fate.UNKNOWN,
    ) -> None:
        self.name = name
        self._dialler = Dialler(dial, first=max(_FIRST_DIAL_TIMEOUT, patience), longest=_LONGEST_DIAL)
        self._connections = connections
        self._patience = patience
        self._fate = fate
        self._renewing = threading.Lock()
        # By the thread that waits: since when, by time.monotonic().
        self._waiting: dict[int, float] = {}
        # Guards what follows, and the session.
        self._books = threading.Lock()
        self._acknowledged = 0
        self._durable = 0
        self._doubt = False
        self._given_up: str | None = None
        self._session = self._open_session()
        self.export: Export = self._session.export

    def call(self, start: Start[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Perform a request that changes nothing; OSError as the server says, EIO when it is gone."""
        return self._perform(start, *args, **kwargs)[0]

    def change(self, durable: bool, start: Start[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Perform a request that changes the disk; ``durable`` says that it includes its own flush (FUA)."""
        result, session = self._perform(start, *args, **kwargs)
        with self._books:
            if not durable and self.export.flush:
                self._acknowledged += 1
                if session.fate is not None:
                    # What acknowledged it has been lost and accounted for meanwhile.
                    self._account_for_unflushed(session.fate)
            given_up = self._given_up
        if given_up is not None:
            raise OSError(errno.EIO, given_up)
        return result

    def flush(self) -> None:
        """Make durable what was acknowledged; EIO, once, when that may have been lost before it was."""
        with self._books:
            covered = self._acknowledged
        _, session = self._perform(Client.start_flush)
        with self._books:
            doubt, self._doubt = self._doubt, False
            if session.fate is None:
                self._durable = max(self._durable, covered)
        if doubt:
            reason = "writes that were acknowledged before the connection was lost may be gone"
            raise OSError(errno.EIO, f"{self.name}: {reason}")

    @property
    def unflushed(self) -> bool:
        """Tell whether a change was acknowledged after the last flush, or may have been lost."""
        with self._books:
            return self._doubt or self._acknowledged > self._durable or self._given_up is not None

    @property
    def waited(self) -> float:
        """Tell for how many seconds somebody has waited in vain: for a byte, or for a server that is lost."""
        session = self._session
        if session.connected:
            return session.quiet
        now = time.monotonic()
        return now - min(list(self._waiting.values()), default=now)

    def close(self) -> None:
        """Take leave of the server."""
        with self._books:
            self._given_up = f"{self.name}: closed"
            session = self._session
        session.close()

    def _perform(self, start: Start[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, Session]:
        """The result, and the session that it came from."""
        self._waiting[threading.get_ident()] = since = time.monotonic()
        try:
            return self._attempt(since + self._patience, start, *args, **kwargs)
        finally:
            del self._waiting[threading.get_ident()]

    def _attempt(
        self, deadline: float, start: Start[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[T, Session]:
        """Perform a request, again and again while it is the connection that fails, until the deadline."""
        # Even without patience a server that was lost and is back is not an error.
        for attempt in itertools.count():
            session = self._connected(deadline)
            try:
                return start(session.next(), *args, **kwargs).result(), session
            except OSError as error:
                fault = fault_of(error)
                if fault is Fault.SERVER:
                    raise self._distrust(session, error) from error
                if fault is Fault.REQUEST:
                    raise
                # One that is late or shutting down is of no more use than one that is gone.
                session.close()
                if not attempt:
                    # However long it has waited for an answer: only now it waits for a server that is lost.
                    deadline = time.monotonic() + self._patience
                elif time.monotonic() >= deadline:
                    raise OSError(errno.EIO, error.strerror) from error
        raise AssertionError

    def _distrust(self, session: Session, error: OSError) -> OSError:
        """The server answered something else than what was asked: nothing that it says counts any more."""
        session.close()
        with self._books:
            if self._given_up is None:
                self._given_up = f"{self.name}: it broke the protocol and is not used any more"
                _LOG.error("%s: the server is not used any more", error.strerror)
            return OSError(errno.EIO, self._given_up)

    def _connected(self, deadline: float) -> Session:
        """The session, a new one if need be; EIO when there is none by the deadline."""
        if self._session.connected:
            return self._session
        if not self._renewing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise OSError(errno.EIO, f"{self.name}: the connection is lost")
        try:
            if not self._session.connected:
                self._account_for_loss(self._session)
                self._use(self._renew(deadline))
            return self._session
        finally:
            self._renewing.release()

    def _use(self, session: Session) -> None:
        """Let requests go to a session; EIO if the upstream has been closed, or given up, meanwhile."""
        with self._books:
            given_up = self._given_up
            if given_up is None:
                self._session = session
                return
        session.close()
        raise OSError(errno.EIO, given_up)

    def _account_for_loss(self, session: Session) -> None:
        """Before another session begins, find out what the loss of the last one means."""
        if session.fate is not None:
            return
        if self._given_up is None:
            _LOG.warning("%s: the connection is lost", self.name)
        session.close()
        fate = self._fate()
        with self._books:
            session.fate = fate
            if self._acknowledged > self._durable:
                self._account_for_unflushed(fate)

    def _account_for_unflushed(self, fate: Fate) -> None:
        """Account for acknowledged writes that were not flushed when their session was lost."""
        self._durable = self._acknowledged
        if fate is Fate.UNKNOWN:
            self._doubt = True
        elif fate is Fate.LOST and self._given_up is None:
            self._given_up = f"{self.name}: acknowledged writes are lost, so nothing is served any more"
            _LOG.error("%s: check the image, and start again", self._given_up)

    def _renew(self, deadline: float) -> Session:
        """Connect again, trying until the deadline; EIO when that fails."""
        pauses = Pauses(_LONGEST_PAUSE)
        while self._given_up is None:
            try:
                session = self._open_session()
            except (OperatorError, OSError) as error:
                if time.monotonic() + pauses.next > deadline:
                    raise OSError(errno.EIO, str(error)) from error
                time.sleep(pauses.next)
                pauses.grow()
            else:
                self._require_same_disk(session)
                _LOG.info("%s: connected again", self.name)
                return session
        raise OSError(errno.EIO, self._given_up)

    def _open_session(self) -> Session:
        session = Session(self._dialler.connect())
        try:
            while session.export.multi_conn and len(session.clients) < self._connections:
                session.add(self._dialler.connect())
        except BaseException:
            session.close()
            raise
        return session

    def _require_same_disk(self, session: Session) -> None:
        """EIO when what answers now is certainly another disk than before."""
        if session.export.size != self.export.size:
            session.close()
            reason = f"the disk had {self.export.size} bytes, what answers now has {session.export.size}"
            _LOG.error("%s: %s: it is not used", self.name, reason)
            raise OSError(errno.EIO, f"{self.name}: {reason}")
