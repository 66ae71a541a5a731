"""The channel's end at the source: carries QEMU's stream, serves disks, connects again, ends when told so."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nbdserve.channel.child.pipes import RamPipes
from nbdserve.channel.dialling import Attempt, Way
from nbdserve.channel.local_ends import LocalEnd, from_socket
from nbdserve.channel.multiplexer import Multiplexer
from nbdserve.channel.terms import REQUESTS, Limits
from nbdserve.channel.transports import Transport
from nbdserve.channel.wire.frames import Bye, Close, CloseReason, Done, Ram, RamStatus, ResetReason
from nbdserve.channel.wire.greeting import Claim, Mode, Offer, Refusal, RefusedError, next_epoch
from nbdserve.channel.wire.return_path import ReturnPath, Verdict
from nbdserve.channel.wire.session import Role, Session
from nbdserve.channel.wire.streams import Stream
from nbdserve.client.dial import Pauses
from nbdserve.common.errors import ConnectError, ConnectionLostError, OperatorError, ProtocolError, reason_of
from nbdserve.connection.listeners import Visitor

_LOG = logging.getLogger("nbdserve")
_LONGEST_PAUSE = 3.0
"""Seconds between two attempts to connect again, at most."""
_ASK = 10.0
"""Seconds in which the thread of a connection does what it is asked, which takes it microseconds."""
_STABLE = 5.0
"""Seconds after which a connection was a good one: when it is lost it is made again at once."""
_LOOK = 0.1
"""Seconds between two looks at whether somebody who is connecting is to stop."""
_FAREWELL = 5.0
"""Seconds for which a destination is looked for that has said DONE, and may not have heard BYE."""


@dataclass(frozen=True)
class SourceSettings:
    """What the source's end is made of."""

    ways: Sequence[Way]
    """Tried in turn."""
    token: bytes
    resume: bool
    """Go on with a session that another process has begun."""
    patience: float
    """Seconds for which a destination that is lost is looked for, once RAM has arrived."""
    limits: Limits = field(default_factory=Limits)


class SessionOverError(OperatorError):
    """The session cannot go on, and why."""


class Source:
    """Runs until the destination needs nothing more. ``serve`` is given each client, in any thread."""

    def __init__(
        self,
        settings: SourceSettings,
        serve: Callable[[Visitor], None],
        ram: RamPipes | None = None,
        connected: Callable[[], None] = lambda: None,
        arrived: Callable[[], None] = lambda: None,
    ) -> None:
        """``connected`` is called each time that the destination has been reached.

        ``arrived`` is called, once or more, when the guest has gone over, and its QEMU here has come to its
        end with that; it returns at once.
        """
        self._settings = settings
        self._serve = serve
        self._ram = ram
        self._connected = connected
        self._arrived = arrived
        self._epoch = 0
        self._pauses = Pauses(_LONGEST_PAUSE)
        self._begun = settings.resume
        self._done_by: float | None = None
        """When it is the end in any case, as the destination needs nothing more."""
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        """Held for moments only: which connection there is."""
        self._current: SourceConnection | None = None

    def stop(self) -> None:
        """Take leave, and let ``run`` return. From any other thread."""
        self._stopping.set()
        with self._lock:
            current = self._current
        if current is not None:
            current.stop()

    def send(self, client: socket.socket) -> None:
        """Send the RAM that a QEMU writes to this socket, which is the channel's from now on.

        Raises OSError, ENOTCONN when the destination is not connected, and has closed it then. Where the
        connection is lost, or the destination takes no RAM, the socket is closed.
        """
        with self._lock:
            current = self._current
        try:
            if current is None:
                raise OSError(errno.ENOTCONN, "the destination is not connected")
            current.send(client)
        except ConnectionLostError as error:
            raise OSError(errno.ENOTCONN, f"the channel is lost: {error}") from error
        finally:
            # Where it has become a stream's end this socket owns nothing any more.
            client.close()

    def run(self) -> None:
        """Work until the destination is done, or ``stop``.

        Raises OperatorError when that cannot be any more: the RAM has failed, the session is somebody
        else's, or nobody was reached for too long. Whatever happens, it has been told what has become of
        RAM.
        """
        try:
            while not self._stopping.is_set():
                connection = self._connect()
                if connection is None or self._carry(connection):
                    return
        except OperatorError as error:
            self._ram_is_over(str(error))
            raise
        finally:
            self._ram_is_over("the channel has ended")

    def _ram_is_over(self, why: str) -> None:
        if self._ram is not None:
            self._ram.over(False, why)

    def _carry(self, connection: SourceConnection) -> bool:
        """Work on a connection; whether there is nothing more to do."""
        with self._lock:
            self._current = connection
        self._connected()
        if self._stopping.is_set():
            connection.stop()
        began, was_heard = time.monotonic(), False
        try:
            was_heard = connection.run()
        except (ConnectionLostError, ProtocolError) as error:
            connection.why = connection.why or str(error)
        finally:
            with self._lock:
                self._current = None
        if connection.ram_was_lost:
            raise SessionOverError(f"the RAM has not arrived: {connection.why}")
        if self._stopping.is_set() or (connection.is_done and was_heard):
            return True
        if connection.is_done and self._done_by is None:
            self._done_by = time.monotonic() + _FAREWELL
        why = connection.why or "the other end has not taken leave"
        _LOG.warning("channel: lost: %s; connecting again", why)
        if time.monotonic() - began >= _STABLE:
            self._pauses.begin_anew()
        return self._pause()

    def _pause(self) -> bool:
        """Wait for the next attempt, longer each time; whether this was stopped meanwhile."""
        stopped = self._stopping.wait(self._pauses.next)
        self._pauses.grow()
        return stopped

    def _connect(self) -> SourceConnection | None:
        """Reach the destination; None when this was stopped meanwhile, or nobody needs it any more."""
        troubles = dict[Way, str]()
        give_up = time.monotonic() + self._settings.patience
        while True:
            for way in self._settings.ways:
                try:
                    return self._reach(way)
                except RefusedError as error:
                    if self._is_over:
                        return None
                    if not self._begun or (not self._epoch and self._settings.resume):
                        raise
                    if error.refusal is Refusal.STALE:
                        raise SessionOverError(str(error)) from error
                    reason = str(error)
                except (ConnectError, ProtocolError) as error:
                    reason = str(error)
                    if not self._begun and way is self._settings.ways[-1]:
                        raise
                if reason != troubles.get(way):
                    troubles[way] = reason
                    _LOG.warning("channel: %s; trying again", reason)
                if self._is_over:
                    return None
            if time.monotonic() >= give_up:
                raise ConnectError(f"{reason}; given up after {self._settings.patience:g} s")
            if self._pause():
                return None

    @property
    def _is_over(self) -> bool:
        """Whether nobody needs to be reached any more."""
        return self._stopping.is_set() or (self._done_by is not None and time.monotonic() >= self._done_by)

    def _reach(self, way: Way) -> SourceConnection | None:
        """Reach the destination this way; as for _connect(). OperatorError when that cannot be done."""
        offer = self._settings.limits.offer(REQUESTS)

        def claim() -> Claim:
            # Each counts, as its answer may be lost; who has had none asks for the next, whatever that is.
            self._epoch = next_epoch(self._epoch) if self._epoch else 0
            return Claim(Mode.RESUME if self._begun else Mode.NEW, self._epoch, offer)

        ram = None if self._begun else self._ram
        attempt = Attempt(way, self._settings.token, claim, self._settings.limits.greeting)
        while not attempt.wait(_LOOK):
            is_broken_off = ram is not None and ram.look_whether_broken_off()
            if is_broken_off or self._is_over:
                attempt.give_up()
            if is_broken_off:
                raise SessionOverError("QEMU has broken the migration off")
            if self._is_over:
                return None
        transport, answer = attempt.result()
        self._epoch = answer.epoch
        try:
            connection = SourceConnection(transport, offer, answer.offer, self._serve, ram, self._arrived)
        except OSError as error:
            transport.close()
            raise ConnectError(f"{way.place}: {reason_of(error)}") from error
        self._begun = True
        _LOG.info("channel: %s: connected", way.place)
        return connection


class SourceConnection:
    """One connection to the destination."""

    def __init__(
        self,
        transport: Transport,
        ours: Offer,
        theirs: Offer,
        serve: Callable[[Visitor], None],
        ram: RamPipes | None,
        arrived: Callable[[], None],
    ) -> None:
        self.is_done = False
        self.ram_was_lost = False
        """RAM was under way, and is not loaded."""
        self.why = ""
        """Why it has ended, where this end knows better than the connection."""
        self._session = Session(Role.CONNECTOR, ours, theirs)
        self._mux = Multiplexer(transport, self._session, self)
        self._serve = serve
        self._ram = ram
        self._arrived = arrived
        self._return_path = ReturnPath()

    def stop(self) -> None:
        """Take leave. From any thread."""
        try:
            self._mux.ask(lambda: self._leave("the source was stopped"))
        except ConnectionLostError:
            # It has ended by itself.
            pass

    def send(self, client: socket.socket) -> None:
        """Open a stream of RAM whose local end is this socket. From any other thread.

        Raises OSError, ConnectionLostError where the connection has ended.
        """
        self._mux.ask(lambda: self._send(client)).result(_ASK)

    def _send(self, client: socket.socket) -> None:
        stream = self._session.open()
        try:
            self._mux.attach(from_socket(stream, client))
        except OSError as error:
            self._session.give_up(stream, ResetReason.BROKEN, reason_of(error))
            raise

    def run(self) -> bool:
        """Work until one end takes leave; returns and raises as Multiplexer.run()."""
        if self._ram is not None:
            self.ram_was_lost = True
            try:
                self._begin(self._ram)
            except OSError as error:
                self._mux.close()
                raise ConnectionLostError(f"QEMU's stream: {reason_of(error)}") from error
        return self._mux.run()

    def _begin(self, ram: RamPipes) -> None:
        """Carry QEMU's stream; OSError where the kernel does not let that be watched."""
        stream = self._session.open()
        look, left = self._look_at_answers, self._qemu_has_left
        end = LocalEnd(
            stream, ram.reader, ram.writer, on_delivery=look, on_hang_up=left, ahead=bytes(ram.ahead)
        )
        self._mux.attach(end)
        self._session.begin(stream)

    def opened(self, stream: Stream) -> LocalEnd:
        """The destination opens a stream: serve NBD on it."""
        ours, theirs = socket.socketpair()
        try:
            self._serve(Visitor(theirs, f"channel, stream {stream.number}"))
        except BaseException:
            ours.close()
            theirs.close()
            raise
        return from_socket(stream, ours)

    def told(self, frame: Ram | Done | Bye | Close) -> None:
        """The destination is done, or cannot go on."""
        match frame:
            case Done():
                self.is_done = True
                self._mux.leave(Bye())
            case Ram(status) if status is RamStatus.FAILED:
                _LOG.warning("channel: the destination could not load the RAM")
            case Ram(_) if self._ram is None:
                self._arrived()
            case Close(_, _) if self.is_done:
                pass
            case Close(CloseReason.REPLACED, text):
                raise SessionOverError(f"channel: {text}")
            case Close(_, text):
                raise OSError(errno.ECONNABORTED, f"the destination has ended the connection: {text}")
            case _:
                pass

    def over(self, stream: Stream, why: str | None) -> None:
        """A stream is at its end."""
        if not stream.carries_ram or self._ram is None:
            return
        if self.ram_was_lost:
            self._fail(why or "the destination has ended it")
        else:
            self._has_loaded(self._ram)

    def _look_at_answers(self, data: memoryview) -> None:
        """The destination's QEMU tells ours something."""
        self._return_path.feed(data)
        if self._return_path.verdict is Verdict.LOADED and self.ram_was_lost:
            _LOG.info("channel: the destination has loaded all RAM")
            self.ram_was_lost = False

    def _qemu_has_left(self) -> None:
        """QEMU sends no more, and waits for its child, with its monitor standing still."""
        if self._ram is None:
            return
        if self.ram_was_lost:
            self._fail("QEMU has broken the migration off")
        else:
            self._has_loaded(self._ram)

    def _has_loaded(self, ram: RamPipes) -> None:
        """The guest is elsewhere, and QEMU, which knows it, waits for its child only."""
        ram.over(True, "")
        self._arrived()

    def _fail(self, why: str) -> None:
        self.why = self.why or why
        self._leave(f"RAM: {self.why}")

    def _leave(self, why: str) -> None:
        self._mux.leave(Close(CloseReason.STOPPED, why))
