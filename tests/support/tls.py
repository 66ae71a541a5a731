"""TLS in tests: certificates made with the openssl command, as QEMU and nbdkit keep them, and their use."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import check
from tests.support.servers import Server
from tests.support.wire import Option, Reply, Wire

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_SIGNS = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
"""What Python 3.13 asks of an authority."""
_NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a directory: ``ca-cert.pem`` beside ``ca-key.pem``."""

    directory: Path

    @classmethod
    def create(cls, directory: Path) -> Authority:
        """Make a new authority, which signed nothing yet."""
        directory.mkdir()
        check("openssl", "req", "-x509", *_KEY, "-days", "2", "-subj", "/CN=authority", *_SIGNS,
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


@dataclass(frozen=True)
class Identities:
    """Directories with certificates, in the layout of QEMU and nbdkit."""

    server: Path
    client: Path
    nobody: Path
    """Only the authority's certificate: a client without its own."""
    stranger: Path
    """A client of another authority, which trusts ours."""
    distrustful: Path
    """A client of ours, which trusts only the other authority."""

    @classmethod
    def create(cls, top: Path) -> Identities:
        """Make an authority of ours and one of somebody else's, and what they issued, in a new directory."""
        ours, theirs = Authority.create(top / "ours"), Authority.create(top / "theirs")
        nobody = top / "nobody"
        nobody.mkdir()
        (nobody / "ca-cert.pem").write_bytes(ours.certificate.read_bytes())
        return cls(
            server=ours.issue(top / "server", "server"),
            client=ours.issue(top / "client", "client"),
            nobody=nobody,
            stranger=theirs.issue(top / "stranger", "client", trust=ours),
            distrustful=ours.issue(top / "distrustful", "client", trust=theirs),
        )


def secure(server: Server, identity: Path, export: str = "") -> str:
    """The URI for a client with the files of a directory."""
    return f"{server.uri(export).replace('nbd://', 'nbds://')}?tls-certificates={identity}"


def encrypt(wire: Wire, context: ssl.SSLContext) -> None:
    """Do the TLS handshake on a connection whose server has acknowledged STARTTLS."""
    wire.socket = context.wrap_socket(wire.socket, server_hostname="localhost")


def started(server: Server, identity: Path) -> Wire:
    """A connection that has haggled for TLS, and may go on to haggle inside."""
    wire = Wire(server.address)
    wire.greet()
    assert wire.haggle(Option.STARTTLS)[-1].kind == Reply.ACK
    encrypt(wire, client_context(identity))
    return wire
