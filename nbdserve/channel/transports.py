"""What carries a channel: a connected socket (TCP, Unix, or an ssh child's), with TLS or without.

Nothing here waits, but for ``converse``, which is for the greeting and has a limit.
"""

from __future__ import annotations

import contextlib
import errno
import math
import select
import socket
import ssl
import time
from typing import Protocol

from nbdserve.channel.wire.greeting import Acceptor, Connector
from nbdserve.client.dial import tune
from nbdserve.common.errors import ConnectionLostError, ProtocolError
from nbdserve.connection.tls import read_records

_UNSENT = 128 << 10
"""Bytes that may wait in the kernel until they are sent: what is sent later cannot overtake them."""
_RECORDS = 128 << 10
"""Bytes of ciphertext that are received at a time."""


class Transport(Protocol):
    """A connection that does not block, of which bytes arrive in order or not at all. For one thread."""

    name: str
    """Whom it leads to, for messages."""

    def fileno(self) -> int:
        """Return the descriptor that poll(2) tells of."""

    def receive_into(self, buffer: memoryview) -> int | None:
        """Receive what has arrived: how many bytes, 0 at the end, None if nothing has. Raises OSError."""

    def send(self, data: memoryview) -> int:
        """Send as much as can be now; how many bytes were taken. Raises OSError."""

    def flush(self) -> bool:
        """Send on what was taken and is still here; whether all of it is out. Raises OSError."""

    def finish(self) -> None:
        """Say that nothing more is sent, after what was. Errors do not matter any more."""

    def close(self) -> None:
        """Hang up."""


class SocketTransport:
    """A socket as it is."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.name = name
        self._sock = sock
        sock.setblocking(False)
        tune(sock.fileno())
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._sock.fileno()

    def receive_into(self, buffer: memoryview) -> int | None:
        """Receive what has arrived: how many bytes, 0 at the end, None if nothing has."""
        try:
            return self._sock.recv_into(buffer)
        except BlockingIOError:
            return None

    def send(self, data: memoryview) -> int:
        """Send as much as can be now; how many bytes were taken."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0

    def flush(self) -> bool:
        """Tell that nothing is kept here."""
        return True

    def finish(self) -> None:
        """Close the half of the connection that is ours."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def interrupt(self) -> None:
        """Let who waits for it see its end. From any thread, but not beside ``close``."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


class TlsTransport:
    """TLS over a transport; whoever made the context says whom it verifies.

    OpenSSL works on memory, so that many records travel with one system call.
    """

    def __init__(
        self, below: SocketTransport, context: ssl.SSLContext, *, server: bool, host: str | None = None
    ) -> None:
        self.name = below.name
        self._below = below
        self._received = ssl.MemoryBIO()
        self._to_send = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._received, self._to_send, server_side=server, server_hostname=host
        )
        self._records = memoryview(bytearray(_RECORDS))
        self._unsent = memoryview(b"")

    def fileno(self) -> int:
        """Return the descriptor below."""
        return self._below.fileno()

    def shake_hands(self, deadline: float) -> None:
        """Agree on keys, each side having verified the other.

        Raises ProtocolError when that fails, ConnectionLostError when the peer goes away or is slow.
        """
        while True:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                self._send_all(deadline)
                wait(self, select.POLLIN, deadline)
                if self._receive_records() == 0:
                    raise ConnectionLostError(f"{self.name}: hung up during the TLS handshake") from None
            except ssl.SSLError as error:
                # OpenSSL has left an alert that tells the other end why.
                with contextlib.suppress(OSError, ConnectionLostError):
                    self._send_all(deadline)
                raise ProtocolError(f"{self.name}: TLS: {_reason(error)}") from error
            else:
                self._send_all(deadline)
                return

    def receive_into(self, buffer: memoryview) -> int | None:
        """Receive what has arrived: how many bytes, 0 at the end, None if nothing has."""
        while True:
            try:
                return read_records(self._object, self._received, buffer)
            except ssl.SSLWantReadError:
                came = self._receive_records()
                if not came:
                    return came
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLError as error:
                raise OSError(errno.EPROTO, f"TLS: {_reason(error)}") from error

    def send(self, data: memoryview) -> int:
        """Encrypt all of it, if what was encrypted before is out; how many bytes were taken."""
        if not self.flush():
            return 0
        view = data
        while view:
            view = view[self._object.write(view) :]
        self.flush()
        return len(data)

    def flush(self) -> bool:
        """Send on what was encrypted; whether all of it is out."""
        while True:
            if not self._unsent:
                self._unsent = memoryview(self._to_send.read())
                if not self._unsent:
                    return True
            count = self._below.send(self._unsent)
            self._unsent = self._unsent[count:]
            if not count:
                return False

    def finish(self) -> None:
        """Tell the other end that nobody has cut the connection, this is the end."""
        with contextlib.suppress(OSError):
            with contextlib.suppress(ssl.SSLError):
                # OpenSSL also wants the other end's goodbye, which nobody waits for here.
                self._object.unwrap()
            if self.flush():
                self._below.finish()

    def close(self) -> None:
        """Hang up."""
        self._below.close()

    def _send_all(self, deadline: float) -> None:
        while not self.flush():
            wait(self, select.POLLOUT, deadline)

    def _receive_records(self) -> int | None:
        count = self._below.receive_into(self._records)
        if count:
            self._received.write(self._records[:count])
        return count


def wait(transport: Transport, event: int, deadline: float) -> None:
    """Wait for an event of poll(2), until a time by time.monotonic(); ConnectionLostError when it is over."""
    left = deadline - time.monotonic()
    poll = select.poll()
    poll.register(transport.fileno(), event)
    if left <= 0 or not poll.poll(math.ceil(left * 1000)):
        raise ConnectionLostError(f"{transport.name}: no greeting in time")


def converse(transport: Transport, greeting: Connector | Acceptor, deadline: float) -> None:
    """Go through the greeting on a transport, until a time by time.monotonic().

    Raises what the greeting raises, ConnectionLostError when the other end goes away or is slow, OSError.
    """
    if isinstance(greeting, Connector):
        _send(transport, greeting.first, deadline)
    while greeting.needed:
        _send(transport, greeting.receive(_receive(transport, greeting.needed, deadline)), deadline)


def _receive(transport: Transport, length: int, deadline: float) -> bytes:
    buffer = memoryview(bytearray(length))
    at = 0
    while at < length:
        count = transport.receive_into(buffer[at:])
        if count is None:
            wait(transport, select.POLLIN, deadline)
        elif count == 0:
            raise ConnectionLostError(f"{transport.name}: hung up in the middle of the greeting")
        else:
            at += count
    return bytes(buffer)


def _send(transport: Transport, data: bytes, deadline: float) -> None:
    view = memoryview(data)
    while view:
        count = transport.send(view)
        view = view[count:]
        if not count:
            wait(transport, select.POLLOUT, deadline)
    while not transport.flush():
        wait(transport, select.POLLOUT, deadline)


def _reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the other end's certificate is refused: {error.verify_message}"
    return error.reason or str(error)
