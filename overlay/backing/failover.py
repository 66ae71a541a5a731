"""The backing: one disk, at one or several servers, of which the healthiest is asked.

Who asks waits while all are lost, for as long as patience lasts; then asking fails at once, until one is
back. A server that comes back, or comes up late, must have the same disk: its size, and a few blocks that
were read before, are compared.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

from nbdserve.client import Target
from nbdserve.client.reconnect import Fault, fault_of
from nbdserve.common.errors import ImageError, reason_of
from nbdserve.protocol.extents import Extent
from nbdserve.protocol.offers import BASE_ALLOCATION
from overlay.backing.connections import Server, Session
from overlay.backing.defaults import CONNECTIONS, PATIENCE
from overlay.backing.identity import Samples
from overlay.backing.reads import LONGEST, Reading, sectors
from overlay.backing.server import Health, Source

_LOG = logging.getLogger("nbd-overlay")

_LEAST_SILENCE = 10.0
"""Seconds for which a server may be silent, however little patience there is."""
_SMALL = 64 << 10
"""Bytes of what is read at once that tells how long small requests take."""
_UNEXPECTED = 5.0
"""Seconds for which a server is waited for of which nobody knows whether it will come."""


class Sources:
    """Servers that have the same disk of ``size`` bytes.

    ``patience`` is for how many seconds after the last server was lost requests wait for one to come back;
    hardly any while not ``is_awaited``, as before a migration begins.

    Safe for several threads. ``_changed`` is held for moments only, with no source's lock under it; who needs
    a server while there is none waits on it, with a limit.
    """

    def __init__(
        self,
        uris: Sequence[Target],
        size: int,
        *,
        connections: int = CONNECTIONS,
        patience: float = PATIENCE,
        is_awaited: Callable[[], bool] = lambda: True,
    ) -> None:
        self.size = size
        self._patience = patience
        self.is_awaited = is_awaited
        """Tells whether it is certain that a server is there, or comes back."""
        self.was_connected = False
        """Whether there has been a server."""
        self.refused: Callable[[str], None] = lambda why: None
        """Told why a server's disk is another one, in that server's thread."""
        self._changed = threading.Condition()
        self._lost_since: float | None = time.monotonic()
        self._closed = False
        self.samples = Samples()
        self._connections = connections
        self._sources = [self._at(uri) for uri in uris]

    def _at(self, uri: Target) -> Source:
        silence = max(_LEAST_SILENCE, self._patience)
        return Source(uri, self._connections, silence, self._require_same_disk, self._tell, self._has_another)

    def start(self) -> None:
        """Connect from now on; what is asked waits until that is done."""
        for source in self._sources:
            source.start()

    def move_to(self, uris: Sequence[Target]) -> None:
        """Connect to servers at these addresses, and hang up elsewhere; may wait for one to hang up.

        Who waits goes on to wait, with patience anew. What answers must be the same disk, as ever.
        """
        with self._changed:
            if self._closed:
                return
            before = self._sources
            known = {str(source.uri): source for source in before}
            self._sources = after = [known.get(str(uri)) or self._at(uri) for uri in uris]
            if self._lost_since is not None:
                self._lost_since = time.monotonic()
        for source in after:
            if source not in before:
                source.start()
        for source in before:
            if source not in after:
                source.close()
        self._tell()

    @property
    def failed(self) -> bool:
        """Tell whether all servers have been lost for longer than patience lasts."""
        since = self._lost_since
        lost = since is not None and time.monotonic() >= since + self._patience
        return lost or self._is_nobody_trusted()

    @property
    def patience(self) -> float:
        """Return the seconds for which a lost server is waited for."""
        return self._patience

    @property
    def connected(self) -> bool:
        """Tell whether a server can be asked now."""
        return self._best() is not None

    @property
    def quiet(self) -> float:
        """Tell for how many seconds no server that is asked has said anything; 0 if one does."""
        sessions = [source.session for source in self._sources]
        return min((session.quiet for session in sessions if session is not None), default=0.0)

    @property
    def length(self) -> int:
        """Tell how many bytes the healthiest server should be asked for in one request."""
        best = self._best()
        return LONGEST if best is None else best.source.pace.length

    @property
    def room(self) -> int | None:
        """Tell how many bytes streaming should have under way; None where only the link's capacity counts."""
        best = self._best()
        if best is None or best.source.pace.length >= LONGEST:
            return None
        return best.source.pace.room

    def health(self) -> list[Health]:
        """Tell how each server is doing."""
        return [source.health() for source in self._sources]

    def retry(self) -> None:
        """Have patience and trust once more, and try at once."""
        with self._changed:
            if self._lost_since is not None:
                self._lost_since = time.monotonic()
            self._changed.notify_all()
        for source in self._sources:
            source.trust()

    def reconnect(self) -> None:
        """Try at once, and have patience once more: there is a way to servers again."""
        with self._changed:
            if self._lost_since is not None:
                self._lost_since = time.monotonic()
        for source in self._sources:
            source.retry()

    def wait(self, seconds: float) -> None:
        """Return when a server can be asked, or after so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self.connected, seconds)

    def session(self) -> Session:
        """Return the healthiest server; wait while there is none. OSError, EIO, when patience is over."""
        best = self._best()
        if best is not None:
            return best
        for source in self._sources:
            source.retry()
        # One that nobody has seen yet may have come in this moment, as with a guest's arrival.
        least = 0.0 if self.was_connected else time.monotonic() + min(self._patience, _UNEXPECTED)
        with self._changed:
            while (best := self._best()) is None:
                self._note_loss()
                left = max(self._seconds_left(), least - time.monotonic())
                if self._closed or left <= 0 or self._is_nobody_trusted():
                    raise OSError(errno.EIO, f"the backing is lost: {self.troubles()}")
                self._changed.wait(min(left, 1.0))
        return best

    def read(self, *parts: tuple[int, memoryview]) -> None:
        """Fill each buffer from its offset, for somebody who waits; OSError when no server can."""
        readings = [Reading(offset, buffer) for offset, buffer in parts]

        def ask(session: Session) -> None:
            began = time.monotonic()
            started: list[Future[None]] = []
            try:
                for reading in readings:
                    if reading.bytes_missing:
                        started.append(reading.start(session.demand, session.source.pace))
            finally:
                # All must be over before a buffer may be used again, or for something else.
                wait(started)
            for future in started:
                future.result()
            if sum(len(buffer) for _, buffer in parts) <= _SMALL:
                session.source.answered(time.monotonic() - began)

        self._ask(ask, lambda: sum(reading.bytes_missing for reading in readings))

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Return the runs of ``base:allocation`` from ``offset`` on, one or more; data if no server knows.

        They may end before or after the range. Raises OSError when no server answers.
        """
        found = [Extent(length, 0)]

        def ask(session: Session) -> None:
            there = min(length, session.export.size - offset)
            if session.export.has_extents and there > 0:
                found[:] = session.demand.start_extents(offset, there, BASE_ALLOCATION).result()

        self._ask(ask)
        return found

    def blame(self, session: Session, error: OSError) -> None:
        """A request of a session failed: what that says of the connection, and of the server."""
        match fault_of(error):
            case Fault.SERVER:
                session.source.distrust(session, reason_of(error))
            case Fault.CONNECTION:
                session.source.lost(session)
            case Fault.REQUEST:
                session.source.failed()

    def check_again(self) -> None:
        """What servers must have has changed: compare, soon, and hang up where it differs."""
        for source in self._sources:
            source.check_again()

    def close(self) -> None:
        """Hang up, and let nobody wait any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for source in self._sources:
            source.close()

    def _ask(self, ask: Callable[[Session], None], left: Callable[[], int] = lambda: 0) -> None:
        """Ask the healthiest; when its connection is lost ask again, when it fails ask the others.

        Patience begins anew whenever ``left``, what has not come yet, has become less.
        """
        refused: dict[Server, OSError] = {}
        before, give_up = left(), time.monotonic() + self._patience
        while True:
            session = self.session()
            if session.source in refused:
                others = [source.session for source in self._sources if source not in refused]
                other = next((found for found in others if found is not None), None)
                if other is None:
                    raise refused[session.source]
                session = other
            try:
                return ask(session)
            except OSError as error:
                self.blame(session, error)
                if left() < before:
                    before, give_up = left(), time.monotonic() + self._patience
                fault = fault_of(error)
                if fault is Fault.REQUEST:
                    refused[session.source] = error
                elif fault is Fault.CONNECTION and time.monotonic() >= give_up:
                    raise OSError(errno.EIO, error.strerror) from error

    def _has_another(self, source: Source) -> bool:
        """Whether another server can be asked that fails no more often than this one."""
        others = [(other, other.session) for other in self._sources if other is not source]
        return any(
            session is not None and not session.quiet and other.rank[0] <= source.rank[0]
            for other, session in others
        )

    def _is_nobody_trusted(self) -> bool:
        return bool(self._sources) and all(source.is_distrusted for source in self._sources)

    def _best(self) -> Session | None:
        ranked = sorted(
            (source for source in self._sources if source.session is not None), key=lambda each: each.rank
        )
        return ranked[0].session if ranked else None

    def _tell(self) -> None:
        """A server was connected or lost."""
        with self._changed:
            if self._best() is not None:
                self._lost_since, self.was_connected = None, True
            else:
                self._note_loss()
            self._changed.notify_all()

    def _note_loss(self) -> None:
        if self._lost_since is None:
            self._lost_since = time.monotonic()

    def _seconds_left(self) -> float:
        since = self._lost_since
        patience = self._patience if self.is_awaited() else min(self._patience, _UNEXPECTED)
        return patience if since is None else since + patience - time.monotonic()

    def troubles(self) -> str:
        """Tell why no server can be asked."""
        return "; ".join(health.trouble or "" for health in self.health()) or "no server is named"

    def _require_same_disk(self, session: Session, go_on: Callable[[], None]) -> None:
        """Refuse a server whose disk is certainly another one."""
        name = str(session.source.uri)
        if sectors(session.export.size) != self.size:
            why = (
                f"{name}: not used: the disk has {self.size} bytes, what answers there {session.export.size}"
            )
            self.refused(why)
            raise ImageError(why)
        self.samples.require_same(session.demand, name, go_on)
