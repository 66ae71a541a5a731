"""The channel's end at the destination: accepts the source, hands RAM to QEMU, opens NBD streams."""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from nbdserve.channel.accepted import Connection, RamState
from nbdserve.channel.admission import Admission, Door
from nbdserve.channel.terms import IN_BULK, Limits
from nbdserve.channel.wire.frames import CloseReason
from nbdserve.channel.wire.greeting import Answer, Claim, Mode, Refusal, is_newer, next_epoch
from nbdserve.common.errors import ConnectionLostError, reason_of
from nbdserve.common.threads import promised
from nbdserve.connection.listeners import Listener

__all__ = ["Destination", "Event", "Limits", "Settings", "Status"]

_LOG = logging.getLogger("nbdserve")
_REPLACED = 0.2
"""Seconds in which one that is replaced may still hear of that; it may be half-open, so that it does not."""
_RETURN = 60.0
"""Seconds in which a source comes back that was told that it is needed no more; later it has gone."""


class Event(Enum):
    """What is told of a channel."""

    BEGUN = "begun"
    """A source has proven itself, and has begun a session."""
    RAM_BEGUN = "ram-begun"
    """QEMU's stream arrives, and is passed on."""
    RAM_LOADED = "ram-loaded"
    """The destination's QEMU has loaded all of it: the guest is here, and the session can only be resumed."""
    RAM_FAILED = "ram-failed"
    """It was broken off, or could not be loaded; another session may begin."""
    LOST = "lost"
    """The connection is lost; all streams are reset."""
    BACK = "back"
    """The source has resumed the session; streams can be opened again."""
    DONE = "done"
    """The source has taken note that it is needed no more, and has taken leave."""


@dataclass(frozen=True)
class Settings:
    """What the destination's end is made of."""

    token: bytes
    """The session's secret; see ``places.read_token``."""
    incoming: str | None
    """The path of the Unix socket on which QEMU waits for the migration; None: no RAM comes this way."""
    tls: ssl.SSLContext | None = None
    """With the source verified; None only on a Unix socket or the loopback."""
    arrived: bool = False
    """The guest is here already, as this end was started again: there is a session, which can be resumed."""
    keeps_ram_waiting: bool = False
    """QEMU gets nothing of RAM before ``let_ram_in``."""
    lasting: bool = False
    """Whoever knows the token may connect at any time, whether or not this end knows of a session: either end
    may have been started again."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Status:
    """How the channel is doing."""

    connected: bool
    peer: str
    """Who is connected, or was last."""
    ram: str
    """``none``, ``under-way``, ``loaded`` or ``failed``."""
    connections: int
    """How often a source was let in."""
    streams: int
    """Open now."""
    sent: int
    received: int
    """Bytes of frames, on all connections."""
    held: int
    """Bytes that have been received and not been taken."""
    bound: int
    """The most that these may be now: the windows of all open streams."""
    trouble: str | None
    """Why it is not connected."""


class Destination:
    """Accepts one channel after the other on ``listeners``. Everything may be called from any thread.

    ``tell`` is called with each event, and a reason or "", in a thread of the channel: it must return at
    once, and call nothing here but ``status``.
    """

    def __init__(
        self, listeners: Sequence[Listener], settings: Settings, tell: Callable[[Event, str], None]
    ) -> None:
        self._settings = settings
        self._tell = tell
        self._offer = settings.limits.offer(IN_BULK)
        self._door = Door(
            listeners, settings.token, settings.tls, settings.limits, self._offer, self._decide, self._enter
        )
        self._lock = threading.Lock()
        """Held for moments only, with no other under it: what the session is, and which connection it has."""
        self._session = settings.arrived
        self._ram = RamState.LOADED if settings.arrived else RamState.NONE
        # Who has brought it: one that was replaced may still be at its end.
        self._bringer: Connection | None = None
        self._epoch = 0
        self._current: Connection | None = None
        self._connections = 0
        self._before = (0, 0)
        self._peer = ""
        self._trouble: str | None = "no source has connected yet"
        self._done_wanted = False
        self._done = threading.Event()
        self._closed = False

    def start(self) -> None:
        """Accept from now on. OSError when there are no threads."""
        self._door.start()

    def open(self) -> socket.socket:
        """Open a stream to an NBD server at the source; a connected socket that does not block.

        Who uses it need not know of the channel: it is at its end when the server closes, or the channel is
        lost. Raises OSError: ENOTCONN at once when no source is connected, EBUSY when too many are open.
        """
        ours, theirs = socket.socketpair()
        try:
            theirs.setblocking(False)
            self.adopt(ours)
        except BaseException:
            theirs.close()
            raise
        return theirs

    def adopt(self, client: socket.socket) -> None:
        """Open a stream of which ``client``, a connected Unix stream socket, is the end; as for ``open``.

        It is the channel's from now on, also when this raises.
        """
        connection = self._current
        try:
            if connection is None:
                raise OSError(errno.ENOTCONN, f"the channel is not connected: {self._trouble}")
            connection.open(client)
        except ConnectionLostError as error:
            raise OSError(errno.ENOTCONN, f"the channel is lost: {error}") from error
        finally:
            # Where it has become a stream's end this socket owns nothing any more.
            client.close()

    def done(self, timeout: float) -> None:
        """Do as say_done(), and wait until the source takes leave. TimeoutError when it has not in time."""
        self.say_done()
        if not self._done.wait(timeout):
            raise TimeoutError(errno.ETIMEDOUT, f"the source has not taken leave within {timeout:g} s")

    def say_done(self) -> None:
        """Tell the source that nothing of it is needed any more: it takes leave, and that is Event.DONE.

        Where it is not connected it is told when it resumes.
        """
        with self._lock:
            self._done_wanted = True
            connection = self._current
        if connection is not None:
            connection.say_done()

    def let_ram_in(self) -> None:
        """Let QEMU have the RAM that was kept waiting."""
        with self._lock:
            connection = self._current
        if connection is not None:
            connection.let_ram_in()

    def hang_up(self, why: str) -> None:
        """End the connection that there is, telling the source why; RAM that is under way fails."""
        with self._lock:
            connection = self._current
        if connection is not None:
            connection.end(CloseReason.STOPPED, why)

    def status(self) -> Status:
        """Tell how the channel is doing."""
        with self._lock:
            connection = self._current
            sent, received = self._before
            mux = None if connection is None else connection.mux
            return Status(
                connected=mux is not None,
                peer=self._peer,
                ram=self._ram.value,
                connections=self._connections,
                streams=0 if mux is None else len(mux.session.streams),
                sent=sent + (mux.sent if mux else 0),
                received=received + (mux.received if mux else 0),
                held=mux.held if mux else 0,
                bound=mux.session.bound if mux else 0,
                trouble=None if mux else self._trouble,
            )

    def close(self) -> None:
        """Listen no more, and end the connection; the streams' ends are closed. The source may not resume."""
        with self._lock:
            self._closed = True
            connection = self._current
        self._door.close()
        if connection is not None:
            connection.end(CloseReason.STOPPED, "the destination ends")
            connection.join()

    # Who comes in.

    def _decide(self, claim: Claim) -> Answer:
        with self._lock:
            refusal, text = self._refusal(claim)
            if refusal is None:
                self._epoch = claim.epoch or next_epoch(self._epoch)
            return Answer(refusal, self._epoch, self._offer, text)

    def _refusal(self, claim: Claim) -> tuple[Refusal | None, str]:
        """Why somebody who has proven himself is refused, if he is."""
        if self._closed:
            return Refusal.STOPPED, "the destination ends"
        if claim.epoch and not is_newer(claim.epoch, self._epoch):
            return Refusal.STALE, "another source end has resumed the session since"
        if claim.mode is Mode.RESUME:
            if self._settings.lasting:
                return None, ""
            return (None, "") if self._session else (Refusal.NOTHING, "there is no session to resume")
        return self._refusal_to_begin()

    def _refusal_to_begin(self) -> tuple[Refusal | None, str]:
        if self._session and self._ram is RamState.LOADED:
            return Refusal.BUSY, "the guest has arrived: the session can only be resumed"
        if self._current is not None:
            return Refusal.BUSY, "a session is under way"
        return None, ""

    def _enter(self, admission: Admission) -> None:
        try:
            connection = Connection(admission, self._offer, self)
        except OSError as error:
            _LOG.warning("channel: %s: hung up: %s", admission.transport.name, reason_of(error))
            admission.transport.close()
            return
        is_new = admission.claim.mode is Mode.NEW
        with self._lock:
            # Much may have happened while the answer was on its way.
            late = self._closed or admission.answer.epoch != self._epoch
            if late or (is_new and self._refusal_to_begin()[0] is not None):
                connection.abandon()
                return
            former, self._current = self._current, connection
            self._connections += 1
            self._peer, self._session = admission.transport.name, True
            if is_new:
                self._ram, self._bringer = RamState.NONE, None
            done_wanted = self._done_wanted
            has_loaded = self._ram is RamState.LOADED
        if former is not None:
            former.end(CloseReason.REPLACED, "another connection has taken the session over", _REPLACED)
        _LOG.info("channel: %s: %s", self._peer, "a session begins" if is_new else "the session goes on")
        self._tell(Event.BEGUN if is_new else Event.BACK, self._peer)
        if has_loaded:
            connection.say_loaded()
        if done_wanted:
            connection.say_done()
        connection.start()

    # What a connection tells, in its thread.

    @property
    def keeps_ram_waiting(self) -> bool:
        """Tell whether QEMU gets nothing of RAM yet."""
        return self._settings.keeps_ram_waiting

    def incoming(self) -> str:
        """Return where QEMU waits for the RAM, of which the stream begins; OSError when it may not."""
        with self._lock:
            again = self._settings.lasting and self._ram is RamState.FAILED
            if self._ram is not RamState.NONE and not again:
                raise OSError(errno.EBUSY, f"the RAM of this session is {self._ram.value} already")
            if self._settings.incoming is None:
                raise OSError(errno.ECONNREFUSED, "the destination takes no RAM: give it --incoming")
            return self._settings.incoming

    def is_loading(self, connection: Connection) -> bool:
        """Tell whether RAM that this connection has brought is under way."""
        with self._lock:
            return self._ram is RamState.UNDER_WAY and self._bringer is connection

    def ram_is(self, connection: Connection, state: RamState, why: str = "") -> None:
        """The RAM that this connection has brought has come to this."""
        with self._lock:
            self._ram = state
            self._bringer = connection if state is RamState.UNDER_WAY else None
            successor = None if self._current is connection else self._current
        if state is RamState.LOADED and successor is not None:
            # It came before that was known.
            successor.say_loaded()
        _LOG.info("channel: RAM: %s%s", state.value, f": {why}" if why else "")
        self._tell(_RAM_EVENTS[state], why)

    def taken_leave(self) -> None:
        """The source has said goodbye."""
        with self._lock:
            self._session = False
        self._done.set()
        self._tell(Event.DONE, "")

    def ended(self, connection: Connection, why: str) -> None:
        """A connection has ended."""
        with self._lock:
            mux = connection.mux
            self._before = self._before[0] + mux.sent, self._before[1] + mux.received
            if self._current is not connection:
                return
            self._current, self._trouble = None, why
            if self._ram is RamState.FAILED:
                self._session = False
            is_news = not (self._closed or self._done.is_set())
            has_been_told, number = self._done_wanted, self._connections
        if is_news:
            _LOG.warning("channel: lost: %s", why)
            self._tell(Event.LOST, why)
            if has_been_told:
                promised("farewell", partial(self._wait_for_return, number))

    def _wait_for_return(self, number: int) -> None:
        """A source that was told to go may have gone, with its BYE lost on the way."""
        if self._done.wait(_RETURN):
            return
        with self._lock:
            is_back = self._closed or self._connections != number
        if not is_back:
            _LOG.warning("channel: the source has not come back: it has gone, or is to be ended by hand")
            self.taken_leave()


_RAM_EVENTS = {
    RamState.UNDER_WAY: Event.RAM_BEGUN,
    RamState.LOADED: Event.RAM_LOADED,
    RamState.FAILED: Event.RAM_FAILED,
}
