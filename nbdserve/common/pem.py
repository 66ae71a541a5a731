"""Files of certificates and keys in PEM, and what may be wrong with each of them."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nbdserve.common.errors import UsageError

_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_BEGIN = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----")
_CERTIFICATES = ("CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE")
_SEQUENCE = 0x30
"""The first byte of DER."""


@dataclass(frozen=True)
class Dates:
    """From when to when, in seconds since the epoch, the certificate of ``subject`` is valid."""

    subject: str
    issuer: str
    begins: float
    ends: float

    @classmethod
    def of(cls, decoded: dict[str, object]) -> Dates:
        """Return those of a certificate as Python's ssl module decodes it."""
        return cls(
            _name(decoded["subject"]),
            _name(decoded["issuer"]),
            ssl.cert_time_to_seconds(str(decoded["notBefore"])),
            # The second that it names still counts.
            ssl.cert_time_to_seconds(str(decoded["notAfter"])) + 1,
        )

    def fault(self, now: float) -> str | None:
        """Return what is wrong at this time, if anything is."""
        if now < self.begins:
            return f"is not valid before {date_text(self.begins)}: wait, or set the clock"
        if now >= self.ends:
            return f"has expired, on {date_text(self.ends)}: renew it"
        return None


Validity = Sequence[tuple[Path, Dates]]
"""Dates of certificates, each with its file."""


def read_certificates(path: Path) -> list[str]:
    """Return the certificates in a file, each in PEM; UsageError when there is none, or one is damaged."""
    text = _read(path)
    found = [block[0] for block in _BLOCK.finditer(text) if block[1] in _CERTIFICATES]
    if not found or len(found) < sum(label in _CERTIFICATES for label in _BEGIN.findall(text)):
        raise _not_pem(path, text, "a certificate", _CERTIFICATES)
    for number, certificate in enumerate(found, start=1):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=certificate)
        except (ssl.SSLError, ValueError) as error:
            which = f"certificate {number}" if len(found) > 1 else "the certificate"
            raise UsageError(f"{path}: {which} in it is damaged: make or fetch it again") from error
    return found


def load_identity(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Load a certificate that has been read, and its key; UsageError when they are no good."""
    text = _read(key)
    try:
        context.load_cert_chain(certificate, key, password=_refuse_to_ask(key))
    except ssl.SSLError as error:
        reason = error.reason or ""
        if reason in _OTHER_KEY:
            raise UsageError(
                f"{key}: this is not the private key of the first certificate in {certificate}"
            ) from error
        if reason in _WEAKNESS:
            raise UsageError(f"{certificate}: {_WEAKNESS[reason]}: make a new one") from error
        raise _not_pem(key, text, "a private key", ("PRIVATE KEY",)) from error


_OTHER_KEY = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
"""What OpenSSL says when a key does not belong to a certificate; the last when it is of another kind."""
_WEAKNESS = {
    "EE_KEY_TOO_SMALL": "the certificate's key is too short to be safe",
    "CA_KEY_TOO_SMALL": "the key of the certificate's issuer is too short to be safe",
    "CA_MD_TOO_WEAK": "the certificate is signed with a digest that is not safe any more",
}


def date_text(seconds: float) -> str:
    """Return a time since the epoch, for people."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"


def require_file(path: Path, what: str = "") -> None:
    """Refuse a pipe, which would be waited for, and a device without an end, as a file to be read whole.

    Raises UsageError, which calls it ``what`` and its path.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UsageError(f"{what}{path}: not a regular file; store what belongs there in one")


def _read(path: Path) -> str:
    require_file(path)
    try:
        return path.read_bytes().decode("latin-1")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def _not_pem(path: Path, text: str, what: str, labels: tuple[str, ...]) -> UsageError:
    """What to say of a file that does not hold what it should."""
    found = _BEGIN.findall(text)
    if not text.strip():
        reason = "the file is empty"
    elif any(label.endswith(labels) for label in found):
        reason = "what is in it is damaged"
    elif found:
        article = "an" if found[0][0] in "AEIOUX" else "a"
        reason = f"it holds {article} {found[0].lower()}"
    elif ord(text[0]) == _SEQUENCE:
        reason = "it looks like DER, which openssl turns into PEM"
    else:
        reason = "nothing in it is PEM"
    return UsageError(f"{path}: no usable {what.removeprefix('a ')}: {reason}; {what} in PEM belongs here")


def _refuse_to_ask(key: Path) -> Callable[[], str]:
    """What takes the place of OpenSSL's question for a passphrase on the terminal."""

    def refuse() -> str:
        raise UsageError(
            f"{key}: the key needs a passphrase, and a server cannot ask for one: store it without"
        )

    return refuse


def _name(parts: object) -> str:
    """A distinguished name as Python's ssl module decodes it; its common name says most."""
    assert isinstance(parts, tuple)
    found = {key: value for part in parts for key, value in part}
    return str(found.get("commonName") or ", ".join(map(str, found.values())) or "nobody")
