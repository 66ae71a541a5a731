"""TLS on the server's side: a stream that threads may share."""

from __future__ import annotations

import contextlib
import errno
import ssl
import threading
from typing import Protocol

from nbdserve.common.errors import ProtocolError

_GULP = 128 << 10
"""Bytes of ciphertext that are received at a time."""


_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the client has shown no certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "the client does not know the authority of this server's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "this server's certificate has expired, says the client",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the client does not accept this server's certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the client does not accept this server's certificate",
}


def _reason(error: ssl.SSLError) -> str:
    """What OpenSSL says, and for what operators have to do with, what it means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate is refused: {error.verify_message}"
    return _REASONS.get(error.reason or "", error.reason or str(error))


def read_records(tls: ssl.SSLObject, received: ssl.MemoryBIO, buffer: memoryview) -> int:
    """Decrypt every record that was received and fits; each call to OpenSSL yields one of 16 KiB at most.

    Raises ssl.SSLError as SSLObject.read() does where there is not even one.
    """
    count = tls.read(len(buffer), buffer)
    assert isinstance(count, int)
    while count < len(buffer) and (received.pending or tls.pending()):
        try:
            more = tls.read(len(buffer) - count, buffer[count:])
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            break
        assert isinstance(more, int)
        count += more
    return count


class Carrier(Protocol):
    """What carries the ciphertext: a socket, or one with a deadline."""

    def recv(self, length: int, /) -> bytes:
        """Receive as socket.recv does."""

    def sendall(self, data: bytes, /) -> None:
        """Send as socket.sendall does."""


class TlsStream:
    """TLS over a connected socket. One thread may receive while another sends.

    OpenSSL's own object must not be used by two threads at once, so it works on memory, under a lock, and the
    system calls are made here. It also takes fewer of them: many records travel with one.
    """

    def __init__(self, sock: Carrier, context: ssl.SSLContext) -> None:
        self._sock = sock
        self._received = ssl.MemoryBIO()
        self._to_send = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._received, self._to_send, server_side=True)
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._broken = False
        """A record may have been sent by half, so that nothing that follows would be understood."""

    def handshake(self) -> None:
        """Agree on keys. ProtocolError when the client is not up to it; OSError when it goes away."""
        while True:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                self._send_pending()
                if not self._receive_more():
                    raise ProtocolError("the client went away during the TLS handshake") from None
            except ssl.SSLError as error:
                # OpenSSL has left an alert that tells the client why.
                self._send_pending()
                raise ProtocolError(f"TLS handshake failed: {_reason(error)}") from error
            else:
                self._send_pending()
                return

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """Receive what has arrived, waiting for at least one byte; 0 at the end of the stream."""
        if not len(buffer):
            return 0
        while True:
            try:
                with self._lock:
                    return read_records(self._object, self._received, buffer)
            except ssl.SSLWantReadError:
                # TLS 1.3 may have something to answer, such as a key update.
                self._send_pending()
                if not self._receive_more():
                    return 0
            except ssl.SSLZeroReturnError:
                return 0
            except ssl.SSLError as error:
                raise ConnectionError(f"TLS: {error.reason or error}") from error

    def sendall(self, data: bytes | bytearray | memoryview, /) -> None:
        """Encrypt and send everything."""
        with self._sending:
            with self._lock:
                view = memoryview(data)
                while view:
                    view = view[self._object.write(view) :]
                ciphertext = self._to_send.read()
            self._pass_on(ciphertext)

    def end(self) -> None:
        """Tell the client that nobody has cut the connection, this is the end. OSError if it is gone."""
        with self._lock, contextlib.suppress(ssl.SSLError):
            # OpenSSL also wants the client's own goodbye, which nobody waits for here.
            self._object.unwrap()
        self._send_pending()

    def _receive_more(self) -> bool:
        ciphertext = self._sock.recv(_GULP)
        if not ciphertext:
            return False
        with self._lock:
            self._received.write(ciphertext)
        return True

    def _send_pending(self) -> None:
        with self._sending:
            with self._lock:
                ciphertext = self._to_send.read()
            if ciphertext:
                self._pass_on(ciphertext)

    def _pass_on(self, ciphertext: bytes) -> None:
        """Send records, with the lock of who sends held."""
        if self._broken:
            raise BrokenPipeError(errno.EPIPE, "what was sent before has not arrived whole")
        try:
            self._sock.sendall(ciphertext)
        except BaseException:
            self._broken = True
            raise
