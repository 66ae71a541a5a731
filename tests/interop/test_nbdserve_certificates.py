"""Certificates that clients would refuse are refused when the server starts, in one line that says why."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.certificates import AUTHORITY, CLIENT, DAY, SERVER, Issued, issue
from tests.support.disks import MIB, random_disk
from tests.support.processes import check, run, wait_until
from tests.support.servers import NBDSERVE, free_tcp_address, nbdserve
from tests.support.tls import secure

CERT = r"/server-cert\.pem: "
UNVERIFIED = rf"{CERT}the certificate cannot be verified: its issuer, "
NO_SERVER = (
    rf"{CERT}the certificate is not one for a server: its key usage, or extended key usage, does not allow"
)
NO_AUTHORITY = r"/ca-cert\.pem: no certificate in it is an authority's, which has CA:TRUE and may sign"
NO_CERTIFICATE, NO_KEY = "no usable certificate: ", "no usable private key: "
RSA_1024 = ("rsa:1024",)


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    """An authority."""
    return issue(tmp_path_factory.mktemp("authority"), "authority", AUTHORITY)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 1 MiB."""
    path = tmp_path / "disk.img"
    random_disk(path, MIB)
    return path


def laid_out(directory: Path, chain: list[Issued], authority: Issued | None) -> Path:
    """A directory as QEMU wants it; the key is that of the first certificate."""
    place = directory / "pki"
    place.mkdir()
    (place / "server-cert.pem").write_text("".join(each.text for each in chain))
    shutil.copy(chain[0].key, place / "server-key.pem")
    if authority is not None:
        (place / "ca-cert.pem").write_text(authority.text)
    return place


def refused(image: Path, *options: str) -> str:
    """The one line with which the server does not start."""
    done = run(NBDSERVE, "-f", "raw", "-k", image.with_name("sock"), *options, image, seconds=10)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert not image.with_name("sock").exists()
    return line


def refused_by_qemu_nbd(image: Path, place: Path) -> subprocess.CompletedProcess[str]:
    """What qemu-nbd says of the same directory."""
    creds = f"tls-creds-x509,id=tls,dir={place},endpoint=server"
    socket = image.with_name("qemu.sock")
    return run(
        "qemu-nbd", "-f", "raw", "--object", creds, "--tls-creds", "tls", "-k", socket, image, seconds=10
    )


def expired_authority(top: Path, ca: Issued) -> tuple[list[Issued], Issued]:
    old = issue(top, "old authority", AUTHORITY, begins=-3 * DAY, ends=-DAY)
    return [issue(top, "server", SERVER, old)], old


def expired_intermediate(top: Path, ca: Issued) -> tuple[list[Issued], Issued]:
    middle = issue(top, "middle", AUTHORITY, ca, begins=-3 * DAY, ends=-DAY)
    return [issue(top, "server", SERVER, middle), middle], ca


def no_chain(top: Path, ca: Issued) -> tuple[list[Issued], Issued]:
    return [issue(top, "server", SERVER, issue(top, "middle", AUTHORITY, ca))], ca


def wrong_chain(top: Path, ca: Issued) -> tuple[list[Issued], Issued]:
    middle, other = (issue(top, name, AUTHORITY, ca) for name in ("middle", "other"))
    return [issue(top, "server", SERVER, middle), other], ca


def no_authority(top: Path, ca: Issued) -> tuple[list[Issued], Issued]:
    nobody = issue(top, "nobody", "basicConstraints=critical,CA:FALSE\n")
    return [issue(top, "server", SERVER, nobody)], nobody


def authority_for_nothing(top: Path, ca: Issued) -> tuple[list[Issued], Issued]:
    extensions = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,digitalSignature\n"
    signer = issue(top, "signer", extensions)
    return [issue(top, "server", SERVER, signer)], signer


FAULTS: dict[str, tuple[Callable[[Path, Issued], tuple[list[Issued], Issued]], str]] = {
    "expired": (
        lambda top, ca: ([issue(top, "server", SERVER, ca, begins=-3 * DAY, ends=-DAY)], ca),
        rf"{CERT}the certificate of server has expired, on 20.*: renew it",
    ),
    "not yet valid": (
        lambda top, ca: ([issue(top, "server", SERVER, ca, begins=DAY)], ca),
        rf"{CERT}the certificate of server is not valid before 20.*: wait, or set the clock",
    ),
    "expired authority": (
        expired_authority,
        r"/ca-cert\.pem: the certificate of old authority has expired, on 20.*: renew it",
    ),
    "expired intermediate": (
        expired_intermediate,
        rf"{CERT}the certificate of middle has expired, on 20.*: renew it",
    ),
    "no chain": (
        no_chain,
        rf"{UNVERIFIED}middle, is neither in this file nor in \S*/ca-cert\.pem: "
        "append the certificates up to the authority's",
    ),
    "another chain": (wrong_chain, rf"{UNVERIFIED}middle, is neither in this file nor in "),
    "another authority": (
        lambda top, ca: ([issue(top, "server", SERVER, issue(top, "stranger", AUTHORITY))], ca),
        rf"{UNVERIFIED}stranger, is neither in this file nor in ",
    ),
    "self-signed": (
        lambda top, ca: ([issue(top, "server", SERVER)], ca),
        rf"{UNVERIFIED}server, is neither in this file nor in ",
    ),
    "of a client": (lambda top, ca: ([issue(top, "server", CLIENT, ca)], ca), NO_SERVER),
    "for signing only": (
        lambda top, ca: ([issue(top, "server", "keyUsage=critical,keyCertSign\n", ca)], ca),
        NO_SERVER,
    ),
    "no authority": (no_authority, NO_AUTHORITY),
    "an authority that may not sign": (authority_for_nothing, NO_AUTHORITY),
    "a short key": (
        lambda top, ca: ([issue(top, "server", SERVER, ca, key=RSA_1024)], ca),
        rf"{CERT}the certificate's key is too short to be safe: make a new one",
    ),
    "SHA-1": (
        lambda top, ca: ([issue(top, "server", SERVER, ca, digest="sha1")], ca),
        # OpenSSL 3.5 finds it when it verifies the chain, 3.0 when it loads the certificate.
        rf"{CERT}the certificate (is signed with a digest that is not safe any more: make a new one"
        r"|cannot be verified: clients would refuse it: CA signature digest algorithm too weak)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_certificate_that_clients_would_refuse_is_refused_at_the_start(
    ca: Issued, image: Path, tmp_path: Path, fault: str
) -> None:
    make, told = FAULTS[fault]
    place = laid_out(tmp_path, *make(tmp_path / "made", ca))
    line = refused(image, f"--tls-certificates={place}")
    assert re.match(f"nbdserve: {re.escape(str(place))}{told}", line), line
    if fault in ("expired", "not yet valid", "expired authority", "no chain", "no authority"):
        stock = refused_by_qemu_nbd(image, place)
        assert stock.returncode == 1, "qemu-nbd refuses it, too"
        assert "certificate" in stock.stderr


@pytest.mark.parametrize("fault", ["expired", "not yet valid", "of a client"])
def test_without_an_authority_the_certificate_itself_is_looked_at(
    ca: Issued, image: Path, tmp_path: Path, fault: str
) -> None:
    make, told = FAULTS[fault]
    place = laid_out(tmp_path, make(tmp_path / "made", ca)[0], None)
    single = [f"--tls-{part}={place}/server-{part}.pem" for part in ("cert", "key")]
    assert re.match(f"nbdserve: {re.escape(str(place))}{told}", refused(image, *single))


def test_without_an_authority_what_follows_the_certificate_must_be_its_chain(
    ca: Issued, image: Path, tmp_path: Path
) -> None:
    place = laid_out(tmp_path, wrong_chain(tmp_path / "made", ca)[0], None)
    single = [f"--tls-{part}={place}/server-{part}.pem" for part in ("cert", "key")]
    why = (
        "its issuer, middle, does not follow it in this file: put behind each certificate that of its issuer"
    )
    assert refused(image, *single).endswith(f"the certificate cannot be verified: {why}")


def served(image: Path, *options: str) -> str:
    """What is logged by a server that starts with these options."""
    with nbdserve("-f", "raw", *options, image, directory=image.parent) as server:
        return server.log.read_text()


def test_a_chain_up_to_the_authority_is_served_and_verified_by_stock_clients(
    ca: Issued, image: Path, tmp_path: Path
) -> None:
    middle = issue(tmp_path / "made", "middle", AUTHORITY, ca)
    place = laid_out(tmp_path, [issue(tmp_path / "made", "server", SERVER, middle), middle], ca)
    options = [f"--tls-certificates={place}", "--tls-require"]
    with nbdserve("-f", "raw", *options, image, directory=tmp_path, at=free_tcp_address()) as server:
        assert check("nbdinfo", "--size", secure(server, place)) == f"{MIB}\n"
        assert "expires" not in server.log.read_text()


def test_who_has_one_authority_for_clients_and_another_for_servers_puts_that_into_the_chain(
    ca: Issued, image: Path, tmp_path: Path
) -> None:
    public = issue(tmp_path / "made", "public", AUTHORITY)
    server = issue(tmp_path / "made", "server", SERVER, public)
    chain = tmp_path / "chain.pem"
    options = [
        f"--tls-cert={chain}",
        f"--tls-key={server.key}",
        f"--tls-ca={ca.certificate}",
        "--tls-verify-peer",
    ]
    chain.write_text(server.text)
    assert "append the certificates up to the authority's" in refused(image, *options)
    chain.write_text(server.text + public.text)
    served(image, *options)


def test_an_authority_may_be_followed_by_another_before_it_expires(
    ca: Issued, image: Path, tmp_path: Path
) -> None:
    old = issue(tmp_path / "made", "old", AUTHORITY, begins=-3 * DAY, ends=-DAY)
    place = laid_out(tmp_path, [issue(tmp_path / "made", "server", SERVER, ca)], ca)
    for authorities in (old.text + ca.text, ca.text + old.text):
        (place / "ca-cert.pem").write_text(authorities)
        log = served(image, f"--tls-certificates={place}", "--tls-verify-peer")
        assert "expire" not in log


def test_what_is_old_in_a_chain_does_no_harm_where_it_is_not_needed(
    ca: Issued, image: Path, tmp_path: Path
) -> None:
    server = issue(tmp_path / "made", "server", SERVER, ca)
    place = laid_out(tmp_path, [server], ca)
    # What an older authority once signed of the same key, as authorities do that follow one another.
    older = issue(tmp_path / "older", "older", AUTHORITY)
    crossed = issue(tmp_path / "older", "middle", AUTHORITY, older, begins=-3 * DAY, ends=-DAY)
    (place / "server-cert.pem").write_text(server.text + crossed.text)
    served(image, f"--tls-certificates={place}")


def test_a_certificate_that_signs_itself_is_served_to_clients_that_know_it(
    ca: Issued, image: Path, tmp_path: Path
) -> None:
    own = issue(tmp_path / "made", "own", SERVER)
    single = [f"--tls-cert={own.certificate}", f"--tls-key={own.key}"]
    served(image, *single)
    served(image, *single, f"--tls-ca={ca.certificate}", "--tls-verify-peer")


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("server-key.pem", "junk\n", NO_KEY + "nothing in it is PEM; a private key in PEM"),
        ("server-key.pem", "", NO_KEY + "the file is empty"),
        ("server-key.pem", "{cert}", NO_KEY + "it holds a certificate"),
        ("server-key.pem", "{key:.80}", NO_KEY + "what is in it is damaged"),
        ("server-key.pem", "{other key}", "this is not the private key of the first certificate in"),
        ("server-key.pem", "{rsa key}", "this is not the private key of the first certificate in"),
        ("server-key.pem", None, "No such file or directory"),
        ("server-cert.pem", "junk\n", NO_CERTIFICATE + "nothing in it is PEM; a certificate in"),
        ("server-cert.pem", "\n", NO_CERTIFICATE + "the file is empty"),
        ("server-cert.pem", "\x30\x82\x01", NO_CERTIFICATE + "it looks like DER, which openssl turns"),
        ("server-cert.pem", "{key}", NO_CERTIFICATE + "it holds a private key"),
        ("server-cert.pem", "{cert:.200}", NO_CERTIFICATE + "what is in it is damaged"),
        ("server-cert.pem", "{bad cert}", "the certificate in it is damaged: make or fetch it again"),
        ("server-cert.pem", "{cert}{bad cert}", "certificate 2 in it is damaged: make or fetch it again"),
        ("server-cert.pem", None, "No such file or directory"),
        ("ca-cert.pem", "junk\n", NO_CERTIFICATE + "nothing in it is PEM"),
        ("ca-cert.pem", "{key}", NO_CERTIFICATE + "it holds a private key"),
    ],
)  # fmt: skip
@pytest.mark.sampled(6)
def test_a_file_that_holds_something_else_is_named_with_what_it_holds(
    ca: Issued, image: Path, tmp_path: Path, file: str, content: str | None, told: str
) -> None:
    server, other = (issue(tmp_path / "made", name, SERVER, ca) for name in ("server", "other"))
    rsa = issue(tmp_path / "made", "rsa", SERVER, ca, key=("rsa:2048",))
    place = laid_out(tmp_path, [server], ca)
    path = place / file
    if content is None:
        path.unlink()
    else:
        texts = {
            "cert": server.text,
            "key": server.key.read_text(),
            "other key": other.key.read_text(),
            "rsa key": rsa.key.read_text(),
            "bad cert": server.text.replace("M", "N", 3),
        }
        path.write_bytes(content.format_map(texts).encode("latin-1"))
    line = refused(image, f"--tls-certificates={place}", "--tls-verify-peer")
    assert re.match(f"nbdserve: {re.escape(str(path))}: {told}", line), line


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(
    ca: Issued, image: Path, tmp_path: Path, name: str
) -> None:
    path = laid_out(tmp_path, [issue(tmp_path / "made", "server", SERVER, ca)], ca) / name
    path.unlink()
    os.mkfifo(path)
    line = refused(image, f"--tls-certificates={path.parent}", "--tls-verify-peer")
    assert line == f"nbdserve: {path}: not a regular file; store what belongs there in one"


def test_a_certificate_that_expires_while_the_server_runs_is_in_the_log(
    ca: Issued, image: Path, tmp_path: Path
) -> None:
    soon = issue(tmp_path / "made", "soon", SERVER, ca, ends=timedelta(seconds=8))
    place = laid_out(tmp_path, [soon], ca)
    options = ["-f", "raw", f"--tls-certificates={place}", "--tls-require"]
    with nbdserve(*options, image, directory=tmp_path, at=free_tcp_address()) as server:
        what = f"{place}/server-cert.pem: the certificate of soon"
        server.process.wait_for_line(f"{what} expires on 20")
        server.process.wait_for_line(f"{what} has expired: new clients refuse it", seconds=20)

        def is_refused() -> bool:
            return run("nbdinfo", "--size", secure(server, place)).returncode == 1

        wait_until(is_refused, "clients refuse it")
        assert server.process.terminate() == 0
