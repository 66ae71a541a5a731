"""Certificates with the dates, extensions and faults that a test wants, made with the openssl command."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tests.support.processes import Argument, check

DAY = timedelta(days=1)
_NAMES = "DNS:localhost,IP:127.0.0.1,IP:::1"
_CA_CONFIG = """
[ca]
default_ca = all
[all]
database = {directory}/index.txt
new_certs_dir = {directory}
rand_serial = yes
unique_subject = no
policy = any
default_md = sha256
[any]
commonName = supplied
"""

AUTHORITY = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
SERVER = f"keyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\nsubjectAltName={_NAMES}\n"
CLIENT = "keyUsage=critical,digitalSignature\nextendedKeyUsage=clientAuth\n"
_IDENTIFIERS = "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, two PEM files; whoever holds them can sign others."""

    certificate: Path
    key: Path

    @property
    def text(self) -> str:
        """The certificate alone."""
        return "-----BEGIN" + self.certificate.read_text().partition("-----BEGIN")[2]


def issue(
    directory: Path,
    name: str,
    extensions: str,
    signer: Issued | None = None,
    *,
    begins: timedelta = -DAY,
    ends: timedelta = 30 * DAY,
    key: tuple[str, ...] = ("ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
    digest: str = "sha256",
) -> Issued:
    """Make ``NAME.pem`` and ``NAME.key`` in a directory, signed by ``signer`` or by itself.

    ``begins`` and ``ends`` count from now.
    """
    directory.mkdir(exist_ok=True)
    made = Issued(directory / f"{name}.pem", directory / f"{name}.key")
    request, config = directory / f"{name}.request", directory / f"{name}.config"
    config.write_text(_CA_CONFIG.format(directory=directory) + f"[wanted]\n{extensions}{_IDENTIFIERS}")
    (directory / "index.txt").write_text("")
    check("openssl", "req", "-newkey", *key, "-nodes", "-subj", f"/CN={name}",
          "-keyout", made.key, "-out", request)  # fmt: skip
    who: list[Argument] = ["-selfsign", "-keyfile", made.key]
    if signer is not None:
        who = ["-cert", signer.certificate, "-keyfile", signer.key]
    now = datetime.now(UTC)
    dates = ["-startdate", f"{now + begins:%Y%m%d%H%M%SZ}", "-enddate", f"{now + ends:%Y%m%d%H%M%SZ}"]
    check("openssl", "ca", "-batch", "-notext", "-config", config, "-extensions", "wanted", "-md", digest,
          *who, *dates, "-in", request, "-out", made.certificate)  # fmt: skip
    return made
