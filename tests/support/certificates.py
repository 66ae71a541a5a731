"""Authorities and certificates for TLS, made with the openssl command in the layout of QEMU and nbdkit."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import check

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a directory: ``ca-cert.pem`` beside ``ca-key.pem``."""

    directory: Path

    @classmethod
    def create(cls, directory: Path) -> Authority:
        """Make a new authority, which signed nothing yet."""
        directory.mkdir()
        check("openssl", "req", "-x509", *_KEY, "-days", "2", "-subj", "/CN=authority",
              "-keyout", directory / "ca-key.pem", "-out", directory / "ca-cert.pem")  # fmt: skip
        return cls(directory)

    @property
    def certificate(self) -> Path:
        """The authority's own certificate."""
        return self.directory / "ca-cert.pem"

    def issue(self, directory: Path, role: str, *, trust: Authority | None = None) -> Path:
        """Fill a directory with the files of a ``server`` or ``client`` of this authority, and return it.

        Its ``ca-cert.pem`` is of the authority that its owner trusts, this one unless another is given.
        """
        directory.mkdir()
        request, certificate = directory / "request.pem", directory / f"{role}-cert.pem"
        check("openssl", "req", *_KEY, "-subj", f"/CN={role}", "-addext", _NAMES,
              "-keyout", directory / f"{role}-key.pem", "-out", request)  # fmt: skip
        check("openssl", "x509", "-req", "-days", "2", "-copy_extensions", "copy", "-CAcreateserial",
              "-CA", self.certificate, "-CAkey", self.directory / "ca-key.pem",
              "-in", request, "-out", certificate)  # fmt: skip
        (directory / "ca-cert.pem").write_bytes((trust or self).certificate.read_bytes())
        return directory


def client_context(directory: Path) -> ssl.SSLContext:
    """A context of Python's own for a client with (or without) files in the directory; it trusts its CA."""
    context = ssl.create_default_context(cafile=str(directory / "ca-cert.pem"))
    if (directory / "client-cert.pem").exists():
        context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    return context
