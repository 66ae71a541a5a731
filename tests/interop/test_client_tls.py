"""TLS from the client's side: servers are verified, and what is wrong with a certificate is said."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from nbdserve.client import connect
from nbdserve.common.errors import ConnectError
from nbdserve.common.uri import parse_uri
from tests.support.certificates import AUTHORITY, CLIENT, DAY, SERVER, Issued, issue
from tests.support.disks import MIB, random_disk
from tests.support.overlays import NBD_OVERLAY, make_overlay, overlay
from tests.support.processes import check, run
from tests.support.servers import Server, TcpAddress, free_tcp_address, nbdkit, nbdserve, qemu_nbd

BIN = Path(sys.executable).parent
SERVERS = ("nbdserve", "nbdkit", "qemu-nbd")


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    """An authority."""
    return issue(tmp_path_factory.mktemp("authority"), "authority", AUTHORITY)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    """An authority that nobody here knows."""
    return issue(tmp_path_factory.mktemp("stranger"), "stranger", AUTHORITY)


def directory_of(top: Path, role: str, ca: Issued | None, own: Issued | None = None) -> Path:
    """A directory of certificates for a ``server`` or ``client``."""
    place = top / f"{role}-pki"
    place.mkdir()
    if ca is not None:
        (place / "ca-cert.pem").write_text(ca.text)
    if own is not None:
        (place / f"{role}-cert.pem").write_text(own.text)
        shutil.copy(own.key, place / f"{role}-key.pem")
    return place


@contextmanager
def serving(kind: str, place: Path, top: Path, *, verify: bool = False) -> Iterator[Server]:
    """A server of 1 MiB that requires TLS, and maybe a certificate of its clients."""
    with ExitStack() as stack:
        yield stack.enter_context(_server(kind, place, top, verify))


def _server(kind: str, place: Path, top: Path, verify: bool) -> AbstractContextManager[Server]:
    at = free_tcp_address()
    if kind == "nbdkit":
        options = ["--tls=require", f"--tls-certificates={place}", *(["--tls-verify-peer"] if verify else [])]
        return nbdkit(*options, "memory", "1M", directory=top, at=at)
    random_disk(top / "disk.img", MIB)
    if kind == "qemu-nbd":
        peer = "on" if verify else "off"
        creds = f"tls-creds-x509,id=tls,dir={place},endpoint=server,verify-peer={peer}"
        options = ["-f", "raw", "--object", creds, "--tls-creds", "tls"]
        return qemu_nbd(*options, top / "disk.img", directory=top, at=at)
    options = [f"--tls-certificates={place}", "--tls-require", *(["--tls-verify-peer"] if verify else [])]
    return nbdserve("-f", "raw", *options, top / "disk.img", directory=top, at=at)


def uri_of(server: Server, place: Path | None, host: str = "127.0.0.1") -> str:
    """The URI for a client with the certificates in a directory."""
    assert isinstance(server.address, TcpAddress)
    uri = f"nbds://{host}:{server.address.port}/"
    return uri if place is None else f"{uri}?tls-certificates={place}"


def complaint(uri: str) -> str:
    """Why a client does not connect."""
    with pytest.raises(ConnectError) as failed:
        connect(parse_uri(uri), timeout=20)
    text = str(failed.value)
    assert text.startswith(f"{uri}: "), text
    return text.removeprefix(f"{uri}: ")


@pytest.mark.parametrize("kind", SERVERS)
def test_a_server_and_a_client_of_one_authority_connect(kind: str, ca: Issued, tmp_path: Path) -> None:
    own, mine = issue(tmp_path / "made", "server", SERVER, ca), issue(tmp_path / "made", "client", CLIENT, ca)
    server_place = directory_of(tmp_path, "server", ca, own)
    client_place = directory_of(tmp_path, "client", ca, mine)
    with (
        serving(kind, server_place, tmp_path, verify=True) as server,
        connect(parse_uri(uri_of(server, client_place))) as client,
    ):
        assert client.size == MIB


def late(top: Path, ca: Issued, stranger: Issued) -> Issued:
    return issue(top, "server", SERVER, ca, begins=-3 * DAY, ends=-DAY)


def early(top: Path, ca: Issued, stranger: Issued) -> Issued:
    return issue(top, "server", SERVER, ca, begins=DAY)


def unknown(top: Path, ca: Issued, stranger: Issued) -> Issued:
    return issue(top, "server", SERVER, stranger)


def misnamed(top: Path, ca: Issued, stranger: Issued) -> Issued:
    return issue(top, "server", "subjectAltName=DNS:elsewhere.example,IP:192.0.2.9\n", ca)


def misused(top: Path, ca: Issued, stranger: Issued) -> Issued:
    return issue(top, "server", CLIENT, ca)


def without_chain(top: Path, ca: Issued, stranger: Issued) -> Issued:
    return issue(top, "server", SERVER, issue(top, "middle", AUTHORITY, ca))


BY = "the server's certificate "
UNKNOWN = BY + "is not signed by an authority in {place}/ca-cert.pem, or it comes without its chain"
OF_SERVER: dict[Callable[[Path, Issued, Issued], Issued], str] = {
    late: BY + "has expired, on 20",
    early: BY + "is not valid before 20",
    unknown: UNKNOWN,
    misnamed: BY + "is for elsewhere.example, 192.0.2.9, and not for 127.0.0.1",
    misused: BY + "is not one for a server, by its key usage",
    without_chain: UNKNOWN,
}


@pytest.mark.parametrize("make", OF_SERVER, ids=lambda make: make.__name__)
def test_what_is_wrong_with_the_servers_certificate_is_said(
    make: Callable[[Path, Issued, Issued], Issued], ca: Issued, stranger: Issued, tmp_path: Path
) -> None:
    own = make(tmp_path / "made", ca, stranger)
    server_place = directory_of(tmp_path, "server", ca, own)
    client_place = directory_of(tmp_path, "client", ca)
    # The others refuse most of these at their start.
    with serving("nbdkit", server_place, tmp_path) as server:
        told = complaint(uri_of(server, client_place))
        assert told.startswith(OF_SERVER[make].format(place=client_place)), told


def test_a_name_that_the_certificate_does_not_have_is_told_with_those_that_it_has(
    ca: Issued, tmp_path: Path
) -> None:
    own = issue(tmp_path / "made", "server", "subjectAltName=DNS:elsewhere.example\n", ca)
    server_place = directory_of(tmp_path, "server", ca, own)
    client_place = directory_of(tmp_path, "client", ca)
    with serving("nbdserve", server_place, tmp_path) as server:
        told = complaint(uri_of(server, client_place, "localhost"))
        assert told == "the server's certificate is for elsewhere.example, and not for localhost"


COMMANDS = {
    "nbdserve": ["{uri}", "-k", "sock"],
    "nbd-overlay": ["create", "--backing", "{uri}", "new.img"],
    "nbd-migrate": ["probe", "{uri}"],
}


@pytest.mark.parametrize("program", COMMANDS)
def test_every_command_that_is_a_client_says_it_in_one_line(
    program: str, ca: Issued, stranger: Issued, tmp_path: Path
) -> None:
    server_place = directory_of(tmp_path, "server", ca, late(tmp_path / "made", ca, stranger))
    client_place = directory_of(tmp_path, "client", ca)
    with serving("nbdkit", server_place, tmp_path) as server:
        uri = uri_of(server, client_place)
        words = [word.format(uri=uri) for word in COMMANDS[program]]
        done = run(BIN / program, *words, cwd=tmp_path, seconds=20)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"{program}: {uri}: the server's certificate has expired, on 20"), line


def test_a_running_overlay_tells_it_in_its_log_and_in_its_status(
    ca: Issued, stranger: Issued, tmp_path: Path
) -> None:
    server_place = directory_of(tmp_path, "server", ca, late(tmp_path / "made", ca, stranger))
    client_place = directory_of(tmp_path, "client", ca)
    with serving("nbdkit", server_place, tmp_path) as server:
        image = make_overlay(tmp_path / "overlay", "flat", MIB, uri_of(server, client_place))
        with overlay(image, directory=tmp_path) as daemon:
            daemon.process.wait_for_line("the server's certificate has expired, on 20")
            told = check(BIN / "nbd-overlay", "status", "--qmp", f"unix:{daemon.qmp_path}")
            assert "the server's certificate has expired" in told


@pytest.mark.parametrize("kind", SERVERS)
def test_who_has_no_certificate_where_one_is_wanted_is_told_so(kind: str, ca: Issued, tmp_path: Path) -> None:
    server_place = directory_of(tmp_path, "server", ca, issue(tmp_path / "made", "server", SERVER, ca))
    client_place = directory_of(tmp_path, "client", ca)
    with serving(kind, server_place, tmp_path, verify=True) as server:
        told = complaint(uri_of(server, client_place))
    wanted = f"put client-cert.pem and client-key.pem into {client_place}"
    assert told == f"the server wants a certificate of this client, which has none: {wanted}"


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("nbdserve", "the server does not know the authority of this client's certificate"),
        ("nbdkit", "the server hangs up on this client's certificate; its log says why"),
        ("qemu-nbd", "the server hangs up on this client's certificate; its log says why"),
    ],
)
def test_whose_certificate_the_server_does_not_trust_is_told_so(
    kind: str, told: str, ca: Issued, stranger: Issued, tmp_path: Path
) -> None:
    server_place = directory_of(tmp_path, "server", ca, issue(tmp_path / "made", "server", SERVER, ca))
    mine = issue(tmp_path / "made", "client", CLIENT, stranger)
    client_place = directory_of(tmp_path, "client", ca, mine)
    with serving(kind, server_place, tmp_path, verify=True) as server:
        assert complaint(uri_of(server, client_place)) == told


@pytest.mark.parametrize(
    ("whose", "line"),
    [
        ("nobody", "the client has shown no certificate"),
        ("stranger", "the client's certificate is refused: unable to get local issuer certificate"),
        ("late", "the client's certificate is refused: certificate has expired"),
        ("distrustful", "the client does not know the authority of this server's certificate"),
    ],
)
def test_the_servers_log_says_why_a_client_was_not_let_in(
    whose: str, line: str, ca: Issued, stranger: Issued, tmp_path: Path
) -> None:
    server_place = directory_of(tmp_path, "server", ca, issue(tmp_path / "made", "server", SERVER, ca))
    mine = None
    if whose == "late":
        mine = issue(tmp_path / "made", "client", CLIENT, ca, begins=-3 * DAY, ends=-DAY)
    elif whose == "stranger":
        mine = issue(tmp_path / "made", "client", CLIENT, stranger)
    trusted = stranger if whose == "distrustful" else ca
    client_place = directory_of(tmp_path, "client", trusted, mine)
    with serving("nbdserve", server_place, tmp_path, verify=whose != "distrustful") as server:
        complaint(uri_of(server, client_place))
        server.process.wait_for_line(f"TLS handshake failed: {line}")


def test_whose_own_certificate_has_expired_is_told_so(ca: Issued, tmp_path: Path) -> None:
    server_place = directory_of(tmp_path, "server", ca, issue(tmp_path / "made", "server", SERVER, ca))
    mine = issue(tmp_path / "made", "client", CLIENT, ca, begins=-3 * DAY, ends=-DAY)
    client_place = directory_of(tmp_path, "client", ca, mine)
    with serving("nbdserve", server_place, tmp_path, verify=True) as server:
        assert (
            complaint(uri_of(server, client_place))
            == "this client's certificate has expired, says the server"
        )


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("ca-cert.pem", "no authority's certificate in PEM is in it"),
        ("client-key.pem", "no usable private key: nothing in it is PEM; a private key in PEM belongs here"),
    ],
)
def test_a_file_of_the_client_that_is_junk_is_named(ca: Issued, tmp_path: Path, file: str, told: str) -> None:
    own, mine = issue(tmp_path / "made", "server", SERVER, ca), issue(tmp_path / "made", "client", CLIENT, ca)
    server_place = directory_of(tmp_path, "server", ca, own)
    client_place = directory_of(tmp_path, "client", ca, mine)
    (client_place / file).write_text("junk\n")
    with serving("nbdserve", server_place, tmp_path) as server:
        assert complaint(uri_of(server, client_place)) == f"{client_place / file}: {told}"


@pytest.mark.parametrize("file", ["ca-cert.pem", "client-cert.pem", "client-key.pem", "keys.psk"])
def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(tmp_path: Path, file: str) -> None:
    os.mkfifo(tmp_path / file)
    query = f"tls-psk-file={tmp_path}/keys.psk" if file == "keys.psk" else f"tls-certificates={tmp_path}"
    for verify in ("", "&tls-verify-peer=0"):
        done = run(NBD_OVERLAY, "create", "--backing", f"nbds://127.0.0.1:1/?{query}{verify}", tmp_path / "i")
        assert done.returncode == 1
        complaint = f"{tmp_path / file}: not a regular file; store what belongs there in one\n"
        assert done.stderr.endswith(f": {complaint}"), done.stderr


def test_a_server_is_never_left_unverified_for_lack_of_an_authority(
    ca: Issued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libnbd 1.14 verifies nothing then (CVE-2024-7383)."""
    server_place = directory_of(tmp_path, "server", ca, issue(tmp_path / "made", "server", SERVER, ca))
    empty = directory_of(tmp_path, "client", None)
    with serving("nbdkit", server_place, tmp_path) as server:
        for place in (empty, tmp_path / "nowhere"):
            told = complaint(uri_of(server, place))
            wanted = f"put the authority's certificate, ca-cert.pem, into {place}"
            assert told == f"the server cannot be verified: {wanted}"
        told = complaint(uri_of(server, None))
        assert told.startswith(
            ("the server's certificate is not signed by", "the server cannot be verified: ")
        )
        with connect(parse_uri(f"{uri_of(server, empty)}&tls-verify-peer=0")) as client:
            assert client.size == MIB
