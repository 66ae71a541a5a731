"""The handshake with one client over its socket: haggling and TLS, all within one time limit."""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass, replace

from nbdserve.common.errors import ConnectionLostError
from nbdserve.connection.tls import TlsStream
from nbdserve.protocol.haggling import Encryption, Haggling, State
from nbdserve.protocol.offers import Agreement, Catalog
from nbdserve.transmission.byte_stream import Stream

_GULP = 64 << 10


@dataclass(frozen=True)
class Terms:
    """What a server grants to every client. ``time_limit`` is in seconds, for all of the handshake."""

    time_limit: float = 10.0
    structured_replies: bool = True
    tls: ssl.SSLContext | None = None
    tls_required: bool = False

    @property
    def encryption(self) -> Encryption:
        """Return what to answer to STARTTLS."""
        if self.tls is None:
            return Encryption.NONE
        return Encryption.REQUIRED if self.tls_required else Encryption.OFFERED

    def requiring_tls(self) -> Terms:
        """Return the same terms for clients that must encrypt."""
        return replace(self, tls_required=True)


@dataclass(frozen=True)
class Outcome:
    """Where a handshake led: the stream to go on with, and what came after the last option.

    ``agreement`` is None when the client said goodbye instead of choosing an export.
    """

    agreement: Agreement | None
    stream: Stream
    leftover: bytes


class TimedSocket:
    """A socket whose operations must all be over by a deadline, until ``release``."""

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self._sock = sock
        self._seconds = seconds
        self._deadline: float | None = time.monotonic() + seconds
        self.silent_since: float | None = None
        """When the peer was sent something, by time.monotonic(), if nothing at all has come from it."""
        self._heard = False

    def recv(self, length: int) -> bytes:
        """Receive as socket.recv does; ConnectionLostError when time is up."""
        self._set_timeout()
        try:
            data = self._sock.recv(length)
            self._heard, self.silent_since = True, None
            return data
        except TimeoutError as error:
            raise self._too_slow() from error

    def sendall(self, data: bytes) -> None:
        """Send as socket.sendall does; ConnectionLostError when time is up."""
        self._set_timeout()
        try:
            self._sock.sendall(data)
        except TimeoutError as error:
            raise self._too_slow() from error
        if not self._heard:
            self.silent_since = time.monotonic()

    def release(self) -> socket.socket:
        """Let operations take their time from now on; the socket as it is."""
        self._deadline = None
        self._sock.settimeout(None)
        return self._sock

    def _set_timeout(self) -> None:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise self._too_slow()
            self._sock.settimeout(left)

    def _too_slow(self) -> ConnectionLostError:
        return ConnectionLostError(f"no export chosen within {self._seconds:g} s")


def shake_hands(timed: TimedSocket, catalog: Catalog, terms: Terms) -> Outcome:
    """Haggle with a client until it has chosen an export or said goodbye.

    Raises ProtocolError when it makes no sense, ConnectionLostError when it goes away or is too slow, OSError
    when the connection breaks.
    """
    tls: TlsStream | None = None
    haggling = Haggling(catalog, structured_replies=terms.structured_replies, encryption=terms.encryption)
    timed.sendall(haggling.greeting())
    while haggling.state not in (State.TRANSMISSION, State.CLOSED):
        if haggling.state is State.ENCRYPTING and terms.tls is not None:
            tls = TlsStream(timed, terms.tls)
            tls.handshake()
            haggling.encrypted()
        data = _receive(tls) if tls else timed.recv(_GULP)
        if not data:
            raise ConnectionLostError("the client went away before it chose an export")
        replies = haggling.receive(data)
        _answer(tls or timed, replies, haggling)
    plain = timed.release()
    return Outcome(haggling.agreement, tls or plain, haggling.leftover)


def _answer(stream: TlsStream | TimedSocket, replies: bytes, haggling: Haggling) -> None:
    """Send replies. Who has said goodbye need not wait for one; nbdinfo 1.22 does not.

    Even to send nothing fails where the client has gone, and its goodbye may not have been received yet.
    """
    if not replies:
        return
    try:
        stream.sendall(replies)
    except ConnectionError:
        if haggling.state is not State.CLOSED:
            raise


def _receive(tls: TlsStream) -> bytes:
    buffer = bytearray(_GULP)
    count = tls.recv_into(memoryview(buffer))
    return bytes(buffer[:count])
