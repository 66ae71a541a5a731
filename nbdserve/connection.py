"""One client: option haggling, then the transmission loop, then a quiet end."""

from __future__ import annotations

import fcntl
import logging
import socket
import struct
import sys
import termios
import time

from nbdserve.errors import ConnectionLostError, ProtocolError
from nbdserve.exports import Exports
from nbdserve.handshake import Terms, shake_hands
from nbdserve.protocol.offers import Agreement
from nbdserve.stream import Stream
from nbdserve.tls import TlsStream
from nbdserve.transmission import Transmission
from nbdserve.workers import Workers

_LOG = logging.getLogger("nbdserve")
_GULP = 64 << 10
_TIMEVAL = struct.Struct("ll")
STALL = 60
"""Seconds of silence that end a client in the middle of a request, or that does not take its replies."""
_BUSY = 1.0
"""Seconds in which a client that never stops sending requests is still served while the server stops."""
_LINGER = 1.0
"""Seconds in which a client may take its last replies before the socket closes."""
_PAUSE = 0.01
"""Seconds between two looks at whether it has."""


class Connection:
    """A client that has been accepted. ``run`` serves it in the calling thread."""

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        exports: Exports,
        workers: Workers,
        terms: Terms,
    ) -> None:
        self.peer = peer
        self.agreement: Agreement | None = None
        self._sock = sock
        self._stream: Stream = sock
        self._exports = exports
        self._workers = workers
        self._terms = terms
        self._transmission: Transmission | None = None
        self._draining = False

    def run(self) -> None:
        """Serve the client to its end. An end that is the client's fault is one line in the log."""
        try:
            with self._sock:
                self._serve()
        except (ProtocolError, ConnectionLostError) as error:
            _LOG.info("%s: %s", self.peer, error)
        except OSError as error:
            _LOG.info("%s: connection lost: %s", self.peer, error.strerror or error)

    def drain(self) -> None:
        """Let what has been received be answered, then end. May be called from any thread."""
        self._draining = True
        if self._transmission is not None:
            self._transmission.finish_by(time.monotonic() + _BUSY)
        # From now on a receive returns what is queued, and then the end of the stream.
        self._shut(socket.SHUT_RD)

    def cut(self) -> None:
        """End now. May be called from any thread."""
        self._shut(socket.SHUT_RDWR)

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
            self._say_goodbye()
        _LOG.debug("%s: disconnected", self.peer)

    def _talk(self) -> None:
        outcome = shake_hands(self._sock, self._exports, self._terms)
        agreement = self.agreement = outcome.agreement
        self._stream = outcome.stream
        if agreement is not None:
            _LOG.debug("%s: serving export %r", self.peer, agreement.offer.name)
            self._limit_stalls()
            backend = self._exports.backend(agreement.offer)
            self._transmission = Transmission(
                outcome.stream, agreement, backend, outcome.leftover, self._workers
            )
            self._transmission.run()

    def _limit_stalls(self) -> None:
        # The kernel's own time-outs: Python's cost a poll() before every receive.
        limit = _TIMEVAL.pack(STALL, 0)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

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
                    time.sleep(_PAUSE)
        except OSError:
            # The client closed first, or keeps the connection open: either way it had its time.
            pass
