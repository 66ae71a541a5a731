"""TLS with keys that a server and its clients know beforehand, in the place of certificates (RFC 4279, 8446).

The file of keys is GnuTLS's, as ``psktool`` makes it and QEMU, nbdkit and libnbd read it: ``USER:KEY`` on
each line, the key in hexadecimal digits. A user that starts with ``#`` is in hexadecimal digits too.
"""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

from nbdserve.common.errors import UsageError
from nbdserve.common.pem import require_file

MOST_KEY = 256
"""The longest key, in bytes, that OpenSSL takes with TLS 1.2."""

MOST_USER = 128
"""The longest name of a user, in bytes, that OpenSSL takes with TLS 1.2."""

LEAST_KEY = 4
"""The shortest key in bytes; GnuTLS refuses shorter ones."""

# With what is agreed on anew for each connection, so that a key that leaks tells nothing of the past. TLS 1.3
# has no others, and as OpenSSL uses these keys there, only those that hash with SHA-256.
_CIPHERS = "kECDHEPSK"


def psk_context(path: Path) -> ssl.SSLContext:
    """Return a context that knows clients by the keys in this file, in TLS 1.2 and newer.

    The file is read once. UsageError when it is no good, or where Python cannot do this yet.
    """
    if sys.version_info < (3, 13):
        version = ".".join(map(str, sys.version_info[:2]))
        raise UsageError(f"--tls-psk needs Python 3.13, and this is {version}: use certificates")
    keys = read_keys(path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0
    context.set_ciphers(_CIPHERS)
    # OpenSSL takes no key at all for a user that is not known.
    context.set_psk_server_callback(lambda user: keys.get(user or "", b""))
    return context


def read_keys(path: Path) -> dict[str, bytes]:
    """Return the users in a file of keys, and their keys; UsageError with the number of a bad line."""
    require_file(path, "--tls-psk ")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--tls-psk {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--tls-psk {path}: not a text file of USER:KEY lines") from error
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            user, key = _entry(line.strip())
        except ValueError as error:
            # Not the line itself: it may hold a key, and this goes to a log.
            raise UsageError(f"--tls-psk {path}, line {number}: {error}") from error
        if user in keys:
            raise UsageError(f"--tls-psk {path}, line {number}: user {user!r} is there twice")
        keys[user] = key
    if not keys:
        raise UsageError(f"--tls-psk {path}: there is no key in it; make one with psktool -u USER -p {path}")
    return keys


def _entry(line: str) -> tuple[str, bytes]:
    """The user and the key of a line; ValueError says what it should be."""
    user, colon, digits = line.rpartition(":")
    if not colon or not user:
        raise ValueError("write USER:KEY, the key in hexadecimal digits")
    try:
        if user.startswith("#"):
            user = bytes.fromhex(user[1:]).decode()
        key = bytes.fromhex(digits)
    except ValueError:
        raise ValueError("write USER:KEY, the key in hexadecimal digits") from None
    if not LEAST_KEY <= len(key) <= MOST_KEY:
        raise ValueError(f"the key has {len(key)} bytes, and must have {LEAST_KEY} to {MOST_KEY}")
    if not 1 <= len(user.encode()) <= MOST_USER:
        raise ValueError(f"the user has {len(user.encode())} bytes, and may have {MOST_USER}")
    return user, key
