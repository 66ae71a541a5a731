"""One client: option haggling, then the transmission loop, then a quiet end."""

from __future__ import annotations

import logging
import socket
import struct
import time
from dataclasses import dataclass

from nbdserve.errors import ConnectionLostError, ProtocolError
from nbdserve.exports import Exports
from nbdserve.protocol.haggling import Haggling, State
from nbdserve.protocol.offers import Agreement
from nbdserve.transmission import Transmission
from nbdserve.workers import Workers

_LOG = logging.getLogger("nbdserve")
_TIMEVAL = struct.Struct("ll")
_HAGGLING_BYTES = 64 << 10
_BUSY = 1.0
"""Seconds in which a client that never stops sending requests is still served while the server stops."""
_LINGER = 1.0
"""Seconds in which a client may take its last replies before the socket closes."""


@dataclass(frozen=True)
class Limits:
    """What a client may cost. All times are in seconds."""

    handshake: float = 10.0
    """From the greeting to the end of haggling."""
    stall: int = 60
    """The longest silence in the middle of a request, or while a reply is not taken."""


class Connection:
    """A client that has been accepted. ``run`` serves it in the calling thread."""

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        exports: Exports,
        workers: Workers,
        limits: Limits,
        *,
        structured_replies: bool,
    ) -> None:
        self.peer = peer
        self.agreement: Agreement | None = None
        self._sock = sock
        self._exports = exports
        self._workers = workers
        self._limits = limits
        self._structured_replies = structured_replies
        self._transmission: Transmission | None = None

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
        haggling = self._haggle()
        agreement = self.agreement = haggling.agreement
        if agreement is None:
            return
        _LOG.debug("%s: serving export %r", self.peer, agreement.offer.name)
        self._prepare_transmission()
        backend = self._exports.backend(agreement.offer)
        self._transmission = Transmission(self._sock, agreement, backend, haggling.leftover, self._workers)
        self._transmission.run()
        self._say_goodbye()
        _LOG.debug("%s: disconnected", self.peer)

    def _haggle(self) -> Haggling:
        deadline = time.monotonic() + self._limits.handshake
        haggling = Haggling(self._exports, structured_replies=self._structured_replies)
        self._send_before(deadline, haggling.greeting())
        while haggling.state not in (State.TRANSMISSION, State.CLOSED):
            data = self._receive_before(deadline)
            if not data:
                raise ConnectionLostError("the client went away before it chose an export")
            self._send_before(deadline, haggling.receive(data))
        return haggling

    def _receive_before(self, deadline: float) -> bytes:
        self._set_timeout(deadline)
        try:
            return self._sock.recv(_HAGGLING_BYTES)
        except TimeoutError as error:
            raise self._too_slow() from error

    def _send_before(self, deadline: float, data: bytes) -> None:
        self._set_timeout(deadline)
        try:
            self._sock.sendall(data)
        except TimeoutError as error:
            raise self._too_slow() from error

    def _set_timeout(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._too_slow()
        self._sock.settimeout(left)

    def _too_slow(self) -> ConnectionLostError:
        return ConnectionLostError(f"no export chosen within {self._limits.handshake:g} s")

    def _prepare_transmission(self) -> None:
        # The kernel's own time-outs: Python's cost a poll() before every receive.
        self._sock.settimeout(None)
        limit = _TIMEVAL.pack(self._limits.stall, 0)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def _say_goodbye(self) -> None:
        """Close so that the last replies arrive: closing with unread input would reset a TCP connection."""
        self._shut(socket.SHUT_WR)
        deadline = time.monotonic() + _LINGER
        try:
            while time.monotonic() < deadline:
                self._sock.settimeout(_LINGER)
                if not self._sock.recv(_HAGGLING_BYTES):
                    return
        except OSError:
            # The client closed first, or keeps the connection open: either way it had its time.
            pass
