"""What is made for one migration: who trusts whom, by which name, for how long."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from recipes.certificates.authority import LIFE, Identity, Issued, issue


@pytest.fixture(scope="module")
def issued() -> Issued:
    """One migration's."""
    return issue(["192.0.2.1", "a.example"], ["b.example", "fe80::2%eth0"])


def context(directory: Path, identity: Identity, authority: str, purpose: ssl.Purpose) -> ssl.SSLContext:
    """A context that shows this identity, and verifies the other end, strictly."""
    (directory / "pem").write_text(identity.certificate + identity.key)
    made = ssl.create_default_context(purpose, cadata=authority)
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_cert_chain(directory / "pem")
    return made


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    """Both sides of a handshake; raises what the client, or else the server, does."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


@pytest.mark.parametrize(
    ("way", "name"), [("ab", "b.example"), ("ab", "fe80::2"), ("ba", "192.0.2.1"), ("ba", "a.example")]
)
def test_each_host_is_a_client_and_a_server_for_the_other(
    tmp_path: Path, issued: Issued, way: str, name: str
) -> None:
    client, server = (getattr(issued, each) for each in way)
    shake_hands(
        context(tmp_path, client, issued.authority, ssl.Purpose.SERVER_AUTH),
        context(tmp_path, server, issued.authority, ssl.Purpose.CLIENT_AUTH),
        name,
    )


def test_a_host_is_not_taken_for_the_other(tmp_path: Path, issued: Issued) -> None:
    client = context(tmp_path, issued.a, issued.authority, ssl.Purpose.SERVER_AUTH)
    server = context(tmp_path, issued.a, issued.authority, ssl.Purpose.CLIENT_AUTH)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for 'b\.example'|match"):
        shake_hands(client, server, "b.example")


def test_who_is_of_another_migration_is_nobody(tmp_path: Path, issued: Issued) -> None:
    other = issue(["192.0.2.1"], ["b.example"])
    ours = context(tmp_path, issued.b, issued.authority, ssl.Purpose.CLIENT_AUTH)
    stranger = context(tmp_path, other.a, issued.authority, ssl.Purpose.SERVER_AUTH)
    with pytest.raises(ssl.SSLError, match=r"verify failed|unknown ca"):
        shake_hands(stranger, ours, "b.example")
    trusting = context(tmp_path, other.a, other.authority, ssl.Purpose.SERVER_AUTH)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(trusting, ours, "b.example")


def test_they_are_of_these_days(issued: Issued) -> None:
    for pem in (issued.authority, issued.a.certificate, issued.b.certificate):
        made = x509.load_pem_x509_certificate(pem.encode())
        now = datetime.now(UTC)
        assert made.not_valid_before_utc < now - timedelta(hours=23)
        assert now < made.not_valid_after_utc <= now + LIFE
    assert timedelta(days=398) > LIFE, "what some libraries take for a server's that is too long"


def test_a_key_is_in_no_words_about_it(issued: Issued) -> None:
    assert "PRIVATE KEY" in issued.a.key
    assert "PRIVATE KEY" not in repr(issued)
