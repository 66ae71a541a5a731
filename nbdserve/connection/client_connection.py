"""One client: option haggling, then the transmission loop, then a quiet end."""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import sys
import termios
import time
from dataclasses import dataclass

from nbdserve.common.errors import ConnectionLostError, ProtocolError
from nbdserve.common.logs import ClientLog
from nbdserve.common.threads import LOOK
from nbdserve.connection.connected_clients import Clients
from nbdserve.connection.handshake import Outcome, Terms, TimedSocket, shake_hands
from nbdserve.connection.listeners import Visitor
from nbdserve.connection.tls import TlsStream
from nbdserve.exports.served_exports import Export, Exports
from nbdserve.protocol.constants import TransmissionFlags
from nbdserve.protocol.offers import Agreement
from nbdserve.transmission.busy_polling import BusyPolling, Watch
from nbdserve.transmission.byte_stream import Stream
from nbdserve.transmission.loop import Transmission
from nbdserve.transmission.traffic import Traffic
from nbdserve.transmission.unfinished_writes import Changes
from nbdserve.transmission.workers import Pools

_GULP = 64 << 10
_SEND_BUFFER = 512 << 10
"""Bytes of replies that may be on their way through a Unix socket."""
_TIMEVAL = struct.Struct("ll")
_BUSY = 1.0
"""Seconds in which a client that never stops sending requests is still served while the server stops."""
_LINGER = 1.0
"""Seconds in which a client may take its last replies before the socket closes."""


@dataclass(frozen=True)
class Shared:
    """What all connections of a server share."""

    exports: Exports
    clients: Clients[Connection]
    pools: Pools
    watch: Watch
    stall: float
    """Seconds of silence that end a client in the middle of a request, or that does not take its replies."""


class Connection:
    """A client that has been accepted. ``run`` serves it in the calling thread.

    It is the server's client ``number``, and what it asks for is counted in ``traffic``.
    """

    def __init__(
        self, visitor: Visitor, shared: Shared, terms: Terms, traffic: Traffic, number: int = 0
    ) -> None:
        self.number = number
        self.peer = visitor.name
        self.host = visitor.host
        self.since = time.time()
        """When it was accepted, in seconds since the epoch."""
        self.agreement: Agreement | None = None
        self.export: Export | None = None
        self.traffic = traffic
        self.changes = Changes(shared.clients.look_again)
        """What it has under way that changes the disk of its export."""
        self._log = ClientLog(visitor.name)
        self._sock = sock = visitor.sock
        self._clients = shared.clients
        self._cut_because: str | None = None
        self._stream: Stream = sock
        self._exports = shared.exports
        self._pools = shared.pools
        self._watch = shared.watch
        self._stall = shared.stall
        self._terms = terms
        self._timed = TimedSocket(sock, terms.time_limit)
        self._transmission: Transmission | None = None
        self._draining = False

    def run(self) -> None:
        """Serve the client to its end. An end that is the client's fault is one line in the log."""
        try:
            with self._sock:
                self._serve()
        except (ProtocolError, ConnectionLostError) as error:
            self._log.info("%s", self._cut_because or error)
        except OSError as error:
            self._log.info("%s", self._cut_because or f"connection lost: {error.strerror or error}")
        except MemoryError:
            self._log.error("connection closed: there is no memory left to serve it")
        else:
            if self._cut_because is not None:
                self._log.info("%s", self._cut_because)

    def drain(self) -> None:
        """Let what has been received be answered, then end. May be called from any thread."""
        self._draining = True
        if (transmission := self._transmission) is not None:
            transmission.finish_by(time.monotonic() + _BUSY)
        # From now on a receive returns what is queued, and then the end of the stream.
        self._shut(socket.SHUT_RD)

    def cut(self, reason: str) -> bool:
        """End now; False if that was said before. ``reason`` is for the log. From any thread."""
        first, self._cut_because = self._cut_because is None, self._cut_because or reason
        self._shut(socket.SHUT_RDWR)
        return first

    @property
    def encrypted(self) -> bool:
        """Tell whether the client speaks TLS."""
        return isinstance(self._stream, TlsStream)

    @property
    def silent_for(self) -> float:
        """Tell for how many seconds it has left the greeting unanswered; 0 if it has not. From any thread."""
        since = self._timed.silent_since
        if since is None or self._shows(select.POLLIN):
            return 0.0
        return time.monotonic() - since

    def has_gone(self) -> bool:
        """Tell whether the client has closed the connection, or its half of it. From any thread."""
        return self._shows(select.POLLRDHUP)

    def _shows(self, event: int) -> bool:
        """Whether poll() tells of the event, or of the connection's end."""
        poll = select.poll()
        try:
            poll.register(self._sock, event)
        except ValueError:
            # Closed on this side already.
            return True
        return bool(poll.poll(0))

    def _shut(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError:
            # The client, or the thread that serves it, was faster: there is nothing left to end.
            pass

    def _serve(self) -> None:
        try:
            self._talk()
        finally:
            if self._cut_because is None:
                self._say_goodbye()
        self._log.debug("disconnected")

    def _talk(self) -> None:
        try:
            outcome = shake_hands(self._timed, self._exports, self._terms)
            self._stream = outcome.stream
            self.agreement = outcome.agreement
            if outcome.agreement is not None:
                self._transmit(outcome, outcome.agreement)
        finally:
            self._clients.finish(self)

    def _transmit(self, outcome: Outcome, agreement: Agreement) -> None:
        # It has chosen: what is opened now may take its time.
        self._clients.handshake_over(self)
        export = self.export = self._exports.enter(agreement.offer, self)
        try:
            if not agreement.offer.flags & TransmissionFlags.READ_ONLY:
                self._clients.wait_for_predecessors(self)
            self._log.debug("serving export %r", export.name)
            self._limit_stalls()
            self._make_room_to_send()
            self._transmission = Transmission(
                outcome.stream,
                agreement,
                export.backend,
                outcome.leftover,
                self._pools.of(export),
                self.traffic,
                BusyPolling(self._sock, self._watch),
                self.changes,
                self.cut,
            )
            self._transmission.run()
        finally:
            # They know each other; their buffers shall not wait for the collector of cyclic garbage.
            self._transmission = None
            self._exports.leave(export, self)

    def _limit_stalls(self) -> None:
        # The kernel's own time-outs: Python's cost a poll() before every receive.
        limit = _TIMEVAL.pack(int(self._stall), int(self._stall % 1 * 1_000_000))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def _make_room_to_send(self) -> None:
        # A sender that has filled a Unix socket sleeps until three quarters are empty: with the usual buffer
        # client and server take turns. The kernel gives less than this to the unprivileged. TCP's grow.
        if self._sock.family == socket.AF_UNIX:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

    def _unsent(self) -> int:
        """How many bytes of replies the client's side has not acknowledged."""
        return int.from_bytes(fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    def _say_goodbye(self) -> None:
        """Close so that the last replies arrive.

        Unread input, and on a connection that is shut in both directions any input, would reset it.
        """
        deadline = time.monotonic() + _LINGER
        try:
            self._sock.settimeout(_LINGER)
            if isinstance(self._stream, TlsStream):
                self._stream.end()
            if not self._draining:
                self._sock.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline:
                if not self._sock.recv(_GULP):
                    if not self._unsent():
                        return
                    time.sleep(LOOK)
        except OSError:
            # The client closed first, or keeps the connection open: either way it had its time.
            pass
