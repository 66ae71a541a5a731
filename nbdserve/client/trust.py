"""By which authority a client verifies servers: libnbd's rules, without its exceptions.

libnbd before 1.20.2 verifies nothing where it finds no ``ca-cert.pem`` (CVE-2024-7383; Debian 12 has 1.14).
So it is always given a directory that has one: what the URI names, or one of libnbd's own places, or else
the system's authorities.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nbdserve.common.errors import ConnectError, UsageError
from nbdserve.common.pem import require_file
from nbdserve.common.uri import NbdUri

AUTHORITY = "ca-cert.pem"
_OWN = ("client-cert.pem", "client-key.pem")

_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
"""Where distributions keep the authorities of the system in one file: Debian and Arch, Fedora, others."""


@contextlib.contextmanager
def certificates(uri: NbdUri) -> Iterator[Path | None]:
    """Return the directory of certificates for libnbd and a URI with TLS; None where it needs none.

    Raises ConnectError when the server is to be verified, and there is no authority to do it by, or when
    there is a pipe or a device where a file belongs.
    """
    tls = uri.tls
    if tls is None or tls.psk_file is not None:
        if tls is not None and tls.psk_file is not None:
            _require_files(uri, Path(tls.psk_file))
        yield None
        return
    named = None if tls.certificates is None else Path(tls.certificates)
    if named is not None:
        _require_files(uri, *(named / name for name in (AUTHORITY, *_OWN)))
    if not tls.verify_peer:
        yield named
        return
    if named is not None and not (named / AUTHORITY).exists():
        raise ConnectError(
            f"{uri}: the server cannot be verified: "
            f"put the authority's certificate, {AUTHORITY}, into {named}"
        )
    found = named or next((place for place in _places() if (place / AUTHORITY).exists()), None)
    if found is not None:
        yield found
        return
    bundle = _system_bundle()
    if bundle is None:
        raise ConnectError(
            f"{uri}: the server cannot be verified: name a directory with the authority's {AUTHORITY}, "
            "tls-certificates=DIR"
        )
    with tempfile.TemporaryDirectory(prefix="nbd-authorities-") as place:
        (Path(place) / AUTHORITY).symlink_to(bundle)
        yield Path(place)


def _require_files(uri: NbdUri, *paths: Path) -> None:
    """Refuse what libnbd would wait for, in the place of files that need not be there."""
    try:
        for path in paths:
            require_file(path)
    except UsageError as error:
        raise ConnectError(f"{uri}: {error}") from error


def _places() -> list[Path]:
    """Where libnbd looks (nbd_set_tls_certificates(3))."""
    home = os.environ.get("HOME")
    if os.geteuid() != 0 and home:
        return [Path(home, ".pki", "libnbd"), Path(home, ".config", "pki", "libnbd")]
    return [Path("/etc/pki/libnbd")]


def _system_bundle() -> Path | None:
    places = (ssl.get_default_verify_paths().cafile, *_BUNDLES)
    return next((Path(place) for place in places if place and Path(place).is_file()), None)
