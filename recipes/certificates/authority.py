"""An authority for one migration, and what it certifies: one key for each host, and then it is forgotten.

Whoever shows a certificate of it is one of the two hosts, as its own key never leaves this process and is
gone when issue() returns. Both hosts are servers, A of the disk and B of the RAM, and clients of the other.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BEFORE = timedelta(days=1)
"""How far the clock of a host may be behind ours."""

LIFE = timedelta(days=365)
"""How long new connections can be made.

Nothing limits how long a stream takes, or a guest waits for its cut-over. A longer life gives nothing away:
only the servers of this migration trust the authority, and its keys are removed with them.
"""


@dataclass(frozen=True)
class Identity:
    """What a host shows and keeps to itself, as PEM."""

    certificate: str
    key: str = field(repr=False)


@dataclass(frozen=True)
class Issued:
    """The certificate of an authority, as PEM, and what it has made for the two hosts."""

    authority: str
    a: Identity
    b: Identity


def issue(a: Collection[str], b: Collection[str]) -> Issued:
    """Make an authority and a certificate for each host; ``a`` and ``b`` are what the hosts are called by.

    These are names, or addresses; an IPv6 address may name an interface behind ``%``.
    """
    key, name = ec.generate_private_key(ec.SECP256R1()), _name("one migration")
    own = _begun(name, name, key.public_key())
    own = own.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    own = own.add_extension(_usage(signs=True), critical=True)
    authority = own.sign(key, hashes.SHA256())
    return Issued(
        _pem(authority),
        _identity("host A of a migration", a, authority, key),
        _identity("host B of a migration", b, authority, key),
    )


def _identity(
    called: str, names: Collection[str], authority: x509.Certificate, signer: ec.EllipticCurvePrivateKey
) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    made = _begun(_name(called), authority.subject, key.public_key(), signer.public_key())
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    made = made.add_extension(_usage(signs=False), critical=True)
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    made = made.add_extension(x509.ExtendedKeyUsage(both), critical=False)
    made = made.add_extension(x509.SubjectAlternativeName(_all_names(names)), critical=False)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Identity(_pem(made.sign(signer, hashes.SHA256())), secret.decode())


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey | None = None,
) -> x509.CertificateBuilder:
    """Return what every certificate has; an authority signs itself."""
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=public)
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - BEFORE).not_valid_after(now + LIFE)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer or public)
    return builder.add_extension(identifier, critical=False)


def _usage(*, signs: bool) -> x509.KeyUsage:
    """Return what a key is for. QEMU wants encipherment of a server's, whatever the kind of key (7.2)."""
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=not signs,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _name(called: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, called)])


def _all_names(names: Collection[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for name in names:
        address, zone, _ = name.partition("%")
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            zone = "a name"
        if zone:
            # To libnbd (1.14) and QEMU (7.2) an address with its interface is a name.
            found.append(x509.DNSName(name))
    return found


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()
