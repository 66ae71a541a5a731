"""A server's certificates: loaded, and refused at the start where clients would refuse them.

Nothing is decoded here: OpenSSL is server and client at once, in memory, and says what it thinks of them.

While the server runs, certificate_expiry.py looks once in a while and logs a certificate that is about to
expire, or has.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from nbdserve.common.errors import UsageError
from nbdserve.common.pem import Dates, Validity, load_identity, read_certificates

_ANY_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which Python has no name."""
_PARTIAL = ssl.VERIFY_X509_PARTIAL_CHAIN
_MESSAGES = 3
"""Turns in which the two ends of a handshake have said everything."""
_UNSUITABLE = 26
_UNKNOWN_ISSUER = (2, 20, 21)
_SELF_SIGNED = 18
"""Codes of X509_STORE_CTX_get_error(3)."""


@dataclass(frozen=True)
class Certificates:
    """The files of a server's identity, in PEM, and how it treats its clients."""

    certificate: Path
    key: Path
    authority: Path | None = None
    verify_peer: bool = False
    """Clients must show a certificate that ``authority`` signed."""
    one_authority: bool = False
    """``authority`` is also the one that clients trust."""

    @classmethod
    def in_directory(cls, directory: Path, *, verify_peer: bool) -> Certificates:
        """Name files as QEMU and nbdkit do: ``ca-cert.pem``, ``server-cert.pem``, ``server-key.pem``."""
        authority = directory / "ca-cert.pem"
        return cls(
            directory / "server-cert.pem",
            directory / "server-key.pem",
            authority if authority.exists() else None,
            verify_peer,
            one_authority=True,
        )


@dataclass(frozen=True)
class Identity:
    """What the files have become: a context, and until when each certificate is valid, with its file."""

    context: ssl.SSLContext
    validity: Validity


def load(files: Certificates) -> Identity:
    """Load the files into a context that speaks TLS 1.2 and newer.

    Raises UsageError, which names the file and its fault, when they are no good: what is expired, not yet
    valid, of another key or purpose, too weak, or without the chain that clients need.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # NBD clients keep their connections: sessions to resume would only cost a round of messages.
    context.num_tickets = 0
    if files.verify_peer and files.authority is None:
        raise UsageError("verifying clients needs the authority that signs them: give --tls-ca")
    chain = read_certificates(files.certificate)
    authorities = [] if files.authority is None else read_certificates(files.authority)
    load_identity(context, files.certificate, files.key)
    try:
        leaf = Dates.of(_verify(context, chain[:1], _ANY_TIME))
    except ssl.SSLCertVerificationError as error:
        raise UsageError(f"{files.certificate}: {_purpose_fault(error)}") from error
    _require_valid(files.certificate, [leaf])
    issuers = [(files.certificate, dates) for dates in _dates(chain[1:])]
    if files.authority is not None:
        issuers += [(files.authority, dates) for dates in _require_authority(files.authority, authorities)]
    try:
        _check_chain(context, files, chain, authorities, leaf)
    except ssl.SSLCertVerificationError as error:
        for path, dates in issuers:
            _require_valid(path, [dates])
        reason = f"the certificate cannot be verified: clients would refuse it: {error.verify_message}"
        raise UsageError(f"{files.certificate}: {reason}") from error
    if files.verify_peer:
        context.load_verify_locations(cadata="\n".join(authorities))
        context.verify_mode = ssl.CERT_REQUIRED
    return Identity(context, ((files.certificate, leaf), *_watched(issuers)))


def _require_valid(path: Path, certificates: list[Dates]) -> None:
    """Refuse a file in which none of some certificates is valid now; the first one says why."""
    faults = [dates.fault(time.time()) for dates in certificates]
    if all(faults):
        raise UsageError(f"{path}: the certificate of {certificates[0].subject} {faults[0]}")


def _require_authority(path: Path, certificates: list[str]) -> list[Dates]:
    """The authorities in a file, of which one must be valid: others may be about to follow, or be of old."""
    found = _dates(certificates)
    if not found:
        raise UsageError(f"{path}: no certificate in it is an authority's, which has CA:TRUE and may sign")
    _require_valid(path, found)
    return found


def _watched(issuers: list[tuple[Path, Dates]]) -> list[tuple[Path, Dates]]:
    """Of each file's issuers the one that is valid for the longest: when that expires nothing is left."""
    return list(dict(sorted(issuers, key=lambda each: each[1].ends)).items())


def _purpose_fault(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code == _UNSUITABLE:
        return (
            "the certificate is not one for a server: its key usage, or extended key usage, does not allow it"
        )
    return f"clients refuse the certificate: {error.verify_message}"


def _check_chain(
    context: ssl.SSLContext, files: Certificates, chain: list[str], authorities: list[str], leaf: Dates
) -> None:
    """Refuse what a client that trusts the authority would; without one, certificates that are no chain.

    Raises UsageError when an issuer is missing, SSLCertVerificationError when one is no good.
    """
    if authorities:
        # The authority may be that of clients only: then the file's own last certificate is where it ends.
        anchors = authorities + [each for each in chain[1:] if _is_self_signed(each)]
        where = (
            f"is neither in this file nor in {files.authority}: append the certificates up to the authority's"
        )
    elif len(chain) > 1:
        anchors = chain[-1:]
        where = "does not follow it in this file: put behind each certificate that of its issuer"
    else:
        return
    try:
        _verify(context, anchors)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _SELF_SIGNED and not files.one_authority:
            # Clients know the certificate itself.
            return
        if error.verify_code not in (*_UNKNOWN_ISSUER, _SELF_SIGNED):
            raise
        reason = f"the certificate cannot be verified: its issuer, {leaf.issuer}, {where}"
        raise UsageError(f"{files.certificate}: {reason}") from error


def _verify(context: ssl.SSLContext, anchors: list[str], flags: int = 0) -> dict[str, object]:
    """The server's certificate as a client decodes it that trusts only ``anchors``.

    Raises SSLCertVerificationError when such a client refuses it.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags = ssl.VerifyFlags(client.verify_flags | _PARTIAL | flags)
    client.load_verify_locations(cadata="\n".join(anchors))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server),
        context.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(_MESSAGES):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    decoded = ends[0].getpeercert()
    assert decoded is not None
    return dict(decoded)


def _dates(certificates: list[str]) -> list[Dates]:
    """Those of the authorities among some certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if certificates:
        context.load_verify_locations(cadata="\n".join(certificates))
    return [Dates.of(dict(decoded)) for decoded in context.get_ca_certs()]


def _is_self_signed(certificate: str) -> bool:
    return any(dates.subject == dates.issuer for dates in _dates([certificate]))
