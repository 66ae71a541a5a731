"""Why TLS with a server fails: asked again by OpenSSL, which tells more than libnbd's error does.

Nothing is ever trusted on this connection: it is made after a failure, and closed.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from nbdserve.client.dial import Countdown, connect_tcp, connect_unix
from nbdserve.client.trust import AUTHORITY
from nbdserve.common.errors import UsageError
from nbdserve.common.pem import Dates, load_identity
from nbdserve.common.uri import NbdUri
from nbdserve.protocol.constants import (
    GREETING_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    ClientFlags,
    Option,
    OptionReply,
)

_ANY_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which Python has no name."""
_GREETING = struct.Struct(">QQH")
_ASK = struct.Struct(">LQLL")
_OPTION = struct.Struct(">QLL")
_ANSWER = struct.Struct(">QLLL")

_DATES = (9, 10)
_UNKNOWN = (2, 18, 19, 20, 21)
_OTHER_NAME = (62, 64)
_OTHER_PURPOSE = 26
"""Codes of X509_STORE_CTX_get_error(3)."""

_ALERTS = {
    "TLSV1_ALERT_UNKNOWN_CA": "the server does not know the authority of this client's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "this client's certificate has expired, says the server",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "this client's certificate was revoked, says the server",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the server does not accept this client's certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the server does not accept this client's certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "this client's certificate is not one for clients",
    "TLSV1_ALERT_ACCESS_DENIED": "the server does not let the owner of this client's certificate in",
}
"""What a server tells that ends the handshake, or, with TLS 1.3, comes right after it."""


def explain(uri: NbdUri, directory: Path | None, seconds: float) -> str | None:
    """Tell why TLS with this server fails, in a phrase; None when this is not about certificates.

    ``directory`` is that of the client's certificates. Takes up to ``seconds`` for each of two connections.
    """
    if uri.tls is None or uri.tls.psk_file is not None:
        return None
    try:
        context = _context(uri, directory)
    except UsageError as error:
        return str(error)
    try:
        return _fault_of_server(uri, context, directory, seconds)
    except (OSError, ValueError, struct.error):
        return None


def _context(uri: NbdUri, directory: Path | None) -> ssl.SSLContext:
    """A client like libnbd's; UsageError for files that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if uri.tls is not None and not uri.tls.verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if directory is None:
        return context
    authority, certificate, key = (
        directory / name for name in (AUTHORITY, "client-cert.pem", "client-key.pem")
    )
    if authority.exists():
        try:
            context.load_verify_locations(authority)
        except (ssl.SSLError, OSError) as error:
            raise UsageError(f"{authority}: no authority's certificate in PEM is in it") from error
    if certificate.exists() and key.exists():
        load_identity(context, certificate, key)
    return context


def _fault_of_server(
    uri: NbdUri, context: ssl.SSLContext, directory: Path | None, seconds: float
) -> str | None:
    agreed = False
    try:
        with _encrypted(uri, context, seconds) as stream:
            agreed = True
            # In TLS 1.3 the server looks at the client's certificate when the client is done.
            stream.sendall(_OPTION.pack(OPTION_MAGIC, Option.LIST, 0))
            return None if stream.recv(1) else _explain_refusal("", directory)
    except ssl.SSLCertVerificationError as error:
        return _explain_verification(uri, context, directory, seconds, error)
    except TimeoutError:
        return None
    except (ssl.SSLError, ConnectionError) as error:
        reason = error.reason or "" if isinstance(error, ssl.SSLError) else ""
        return _explain_refusal(reason, directory) if agreed or "ALERT" in reason else None


def _explain_refusal(reason: str, directory: Path | None) -> str:
    """Why the server has hung up on this client, by its alert; GnuTLS's servers send none."""
    if directory is not None and (directory / "client-cert.pem").exists():
        return _ALERTS.get(reason, "the server hangs up on this client's certificate; its log says why")
    place = (
        f"put client-cert.pem and client-key.pem into {directory}" if directory else "tls-certificates=DIR"
    )
    return f"the server wants a certificate of this client, which has none: {place}"


def _explain_verification(
    uri: NbdUri,
    context: ssl.SSLContext,
    directory: Path | None,
    seconds: float,
    error: ssl.SSLCertVerificationError,
) -> str:
    """What is wrong with the server's certificate. Its details are known only if all else is right."""
    code = error.verify_code
    if code in _UNKNOWN:
        by = f"{directory}/{AUTHORITY}" if directory else "the system's authorities"
        return (
            f"the server's certificate is not signed by an authority in {by}, or it comes without its chain"
        )
    if code == _OTHER_PURPOSE:
        return "the server's certificate is not one for a server, by its key usage"
    if code in _DATES:
        context.verify_flags |= ssl.VerifyFlags(_ANY_TIME)
    elif code in _OTHER_NAME:
        context.check_hostname = False
    else:
        return f"the server's certificate is refused: {error.verify_message}"
    details = _certificate(uri, context, seconds)
    if code in _OTHER_NAME:
        names = ", ".join(str(name) for _, name in details.get("subjectAltName", ()))  # type: ignore[attr-defined]
        return f"the server's certificate is for {names or 'other names'}, and not for {uri.host}"
    fault = Dates.of(details).fault(time.time()) if details else None
    # The authority's may be what has expired.
    return f"the server's certificate {fault or 'or its authority: ' + error.verify_message}"


def _certificate(uri: NbdUri, context: ssl.SSLContext, seconds: float) -> dict[str, object]:
    """The server's certificate; empty when it cannot be had."""
    with contextlib.suppress(OSError, ValueError, struct.error), _encrypted(uri, context, seconds) as stream:
        return dict(stream.getpeercert() or {})
    return {}


@contextlib.contextmanager
def _encrypted(uri: NbdUri, context: ssl.SSLContext, seconds: float) -> Iterator[ssl.SSLSocket]:
    """A connection on which STARTTLS was agreed on; ValueError when the server does not speak like that."""
    with _connected(uri, seconds) as plain:
        _, _, _ = greeting = _GREETING.unpack(_exactly(plain, _GREETING.size))
        if greeting[:2] != (GREETING_MAGIC, OPTION_MAGIC):
            raise ValueError("this is no NBD server")
        flags = ClientFlags.FIXED_NEWSTYLE | ClientFlags.NO_ZEROES
        plain.sendall(_ASK.pack(flags, OPTION_MAGIC, Option.STARTTLS, 0))
        magic, option, kind, length = _ANSWER.unpack(_exactly(plain, _ANSWER.size))
        if (magic, option, kind, length) != (OPTION_REPLY_MAGIC, Option.STARTTLS, OptionReply.ACK, 0):
            raise ValueError("the server has no TLS")
        name = uri.host if uri.socket is None else None
        if name is None:
            context.check_hostname = False
        with context.wrap_socket(plain, server_hostname=name) as stream:
            yield stream


def _connected(uri: NbdUri, seconds: float) -> socket.socket:
    limit = Countdown(seconds)
    peer = connect_unix(uri.socket, limit) if uri.socket else connect_tcp(uri.host, uri.port, limit)
    peer.settimeout(seconds)
    return peer


def _exactly(stream: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        more = stream.recv(length - len(received))
        if not more:
            raise ValueError("the server hung up")
        received += more
    return received
