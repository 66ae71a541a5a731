"""One connection that the destination has accepted: its streams of NBD, and the RAM for its QEMU."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Protocol

from nbdserve.channel.admission import Admission
from nbdserve.channel.local_ends import LocalEnd, from_socket
from nbdserve.channel.multiplexer import Multiplexer
from nbdserve.channel.wire.frames import Bye, Close, CloseReason, Done, Ram, RamStatus, ResetReason
from nbdserve.channel.wire.greeting import Offer
from nbdserve.channel.wire.return_path import ReturnPath, Verdict
from nbdserve.channel.wire.session import Role, Session
from nbdserve.channel.wire.streams import Stream
from nbdserve.common.errors import ConnectionLostError, OperatorError, ProtocolError, reason_of
from nbdserve.common.threads import Thread

_ASK = 10.0
"""Seconds in which the thread of a connection does what it is asked, which takes it microseconds."""
_LEAVE = 2.0
"""Seconds that the source has to take the last words."""


class RamState(Enum):
    """What has become of the RAM in a session."""

    NONE = "none"
    UNDER_WAY = "under-way"
    LOADED = "loaded"
    FAILED = "failed"


class Owner(Protocol):
    """Whose connection it is. All of it is called in the connection's thread, and returns at once."""

    def is_loading(self, connection: Connection) -> bool:
        """Tell whether RAM that this connection has brought is under way."""

    @property
    def keeps_ram_waiting(self) -> bool:
        """Tell whether QEMU gets nothing of RAM before ``let_ram_in``."""

    def incoming(self) -> str:
        """Return where QEMU waits for the RAM, of which the stream begins; OSError when it may not."""

    def ram_is(self, connection: Connection, state: RamState, why: str = "") -> None:
        """The RAM that this connection has brought has come to this."""

    def taken_leave(self) -> None:
        """The source has said goodbye."""

    def ended(self, connection: Connection, why: str) -> None:
        """It has ended, and all its streams."""


class Connection:
    """An accepted connection, with a thread of its own from ``start`` on."""

    def __init__(self, admission: Admission, ours: Offer, owner: Owner) -> None:
        self._owner = owner
        self._session = Session(Role.ACCEPTOR, ours, admission.claim.offer)
        self.mux = Multiplexer(admission.transport, self._session, self)
        # The last stream of RAM: where one may follow another, what becomes of the former says nothing of it.
        self._ram: LocalEnd | None = None
        self._has_said_done = False
        self._thread = Thread(self._run, "channel")

    # From any thread.

    def start(self) -> None:
        """Begin to work."""
        try:
            self._thread.start()
        except OSError as error:
            self.abandon()
            self._owner.ended(self, reason_of(error))

    def abandon(self) -> None:
        """Hang up instead of starting."""
        self.mux.close()

    def open(self, client: socket.socket) -> None:
        """Open a stream whose local end is this socket, which it takes.

        Raises OSError, ConnectionLostError where the connection has ended.
        """
        self.mux.ask(partial(self._open, client)).result(_ASK)

    def say_done(self) -> None:
        """Tell the source that nothing is needed any more."""
        # Where the connection has ended it is told on the next one.
        self._ask(self._say_done)

    def say_loaded(self) -> None:
        """Tell a source that has come back that the guest is here."""
        self._ask(partial(self._session.say, Ram(RamStatus.LOADED)))

    def let_ram_in(self) -> None:
        """Let QEMU have what was kept waiting of RAM."""
        self._ask(self._let_ram_in)

    def end(self, reason: CloseReason, text: str, limit: float = _LEAVE) -> None:
        """Take leave, and end in so many seconds at the latest."""
        self._ask(partial(self.mux.leave, Close(reason, text), limit))

    def join(self) -> None:
        """Wait for the end."""
        if self._thread.is_alive():
            self._thread.join()

    def _ask(self, work: Callable[[], None]) -> None:
        """Have its thread do something, unless it has ended."""
        with suppress(ConnectionLostError):
            self.mux.ask(work)

    # In its thread.

    def _say_done(self) -> None:
        self._has_said_done = True
        self._session.say(Done())

    def _let_ram_in(self) -> None:
        if self._ram is not None:
            self.mux.let_in(self._ram)

    def _run(self) -> None:
        why = "it was ended here"
        try:
            self.mux.run()
        except OperatorError as error:
            why = str(error)
        finally:
            self._owner.ended(self, why)

    def _open(self, client: socket.socket) -> None:
        stream = self._session.open()
        try:
            self.mux.attach(from_socket(stream, client))
        except OSError as error:
            self._session.give_up(stream, ResetReason.BROKEN, reason_of(error))
            raise

    def opened(self, stream: Stream) -> LocalEnd:
        """The source opens the stream of RAM: connect it to QEMU."""
        path = self._owner.incoming()
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            code = sock.connect_ex(path)
            if code:
                raise OSError(code, f"the destination's QEMU does not wait at {path}: {os.strerror(code)}")
            end = from_socket(stream, sock, on_read=partial(self._listen, stream, ReturnPath()))
        except BaseException:
            sock.close()
            raise
        end.is_kept_waiting = self._owner.keeps_ram_waiting
        self._ram = end
        self._owner.ram_is(self, RamState.UNDER_WAY)
        return end

    def told(self, frame: Ram | Done | Bye | Close) -> None:
        """The source takes leave."""
        if isinstance(frame, Bye):
            if not self._has_said_done:
                raise ProtocolError("channel: BYE without DONE")
            self._owner.taken_leave()
        elif isinstance(frame, Close):
            raise OSError(errno.ECONNABORTED, frame.text or frame.reason.name.lower())

    def over(self, stream: Stream, why: str | None) -> None:
        """A stream is at its end: if that of RAM is before QEMU has loaded all of it, it never will."""
        if self._is_under_way(stream):
            self._session.say(Ram(RamStatus.FAILED))
            self._owner.ram_is(self, RamState.FAILED, why or "it has ended before everything was loaded")

    def _is_under_way(self, stream: Stream) -> bool:
        return self._ram is not None and stream is self._ram.stream and self._owner.is_loading(self)

    def _listen(self, stream: Stream, return_path: ReturnPath, said: memoryview) -> None:
        """QEMU tells the source's QEMU something, or has ended: OSError where it should not have."""
        return_path.feed(said)
        if not self._is_under_way(stream):
            return
        if not said:
            unheard = "the destination's QEMU said nothing; set the capability return-path on both sides"
            broken = "the destination's QEMU has ended it before it had loaded everything"
            raise OSError(errno.ECONNRESET, broken if return_path.heard else unheard)
        if return_path.verdict is Verdict.LOADED:
            self._session.say(Ram(RamStatus.LOADED))
            self._owner.ram_is(self, RamState.LOADED)
        elif return_path.verdict is Verdict.FAILED:
            self._session.say(Ram(RamStatus.FAILED))
            self._owner.ram_is(self, RamState.FAILED, "QEMU could not load it")
