"""TLS with stock clients: who is let in, and much at once."""

from __future__ import annotations

import signal
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import nbd
import pytest

from tests.support.disks import KIB, MIB, ODD_SIZE, random_bytes, random_disk
from tests.support.processes import Argument, Process, check, run
from tests.support.servers import NBDSERVE, Server, TcpAddress, free_tcp_address, nbdkit, nbdserve, qemu_nbd
from tests.support.tls import Identities, client_context, encrypt, secure, started
from tests.support.wire import Command, Option, Reply, Wire, export_query, request


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of an odd size."""
    path = tmp_path / "disk.img"
    random_disk(path, ODD_SIZE)
    return path


@pytest.fixture
def required(identities: Identities, image: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that wants TLS of everyone."""
    options = [f"--tls-certificates={identities.server}", "--tls-require"]
    with nbdserve("-f", "raw", *options, image, directory=tmp_path, at=free_tcp_address()) as server:
        yield server


@pytest.fixture
def optional(identities: Identities, image: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that leaves it to the client."""
    options = [f"--tls-certificates={identities.server}"]
    with nbdserve("-f", "raw", *options, image, directory=tmp_path, at=free_tcp_address()) as server:
        yield server


def qemu_img_source(server: Server, identity: Path) -> list[Argument]:
    """The arguments by which QEMU's tools name the export."""
    assert isinstance(server.address, TcpAddress)
    options = f"driver=nbd,host={server.address.host},port={server.address.port},tls-creds=tls"
    creds = f"tls-creds-x509,id=tls,dir={identity},endpoint=client"
    return ["--object", creds, "--image-opts", f"driver=raw,file.{options.replace(',', ',file.')}"]


# Stock clients.


def test_stock_clients_read_and_write_through_tls(
    required: Server, identities: Identities, image: Path, tmp_path: Path
) -> None:
    uri = secure(required, identities.nobody)
    assert check("nbdinfo", "--size", uri) == f"{ODD_SIZE}\n"
    assert "protocol: newstyle-fixed with TLS" in check("nbdinfo", uri)
    assert "export=" in check("nbdinfo", "--list", uri)
    new = random_bytes(ODD_SIZE, seed=2)
    (tmp_path / "new.img").write_bytes(new)
    check("nbdcopy", tmp_path / "new.img", uri)
    assert image.read_bytes() == new
    check("nbdcopy", uri, tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == new


def test_qemu_reads_through_tls(required: Server, identities: Identities, image: Path) -> None:
    told = check("qemu-img", "info", *qemu_img_source(required, identities.nobody))
    assert f"({ODD_SIZE // 512 * 512 + 512} bytes)" in told
    check("qemu-io", *qemu_img_source(required, identities.nobody), "-c", "write -P 0xab 64k 64k")
    assert image.read_bytes()[64 * KIB : 128 * KIB] == b"\xab" * 64 * KIB


def test_without_tls_nothing_is_told_where_it_is_required(required: Server, image: Path) -> None:
    for command in (["--size"], ["--list"]):
        refused = run("nbdinfo", *command, required.uri())
        assert refused.returncode == 1
        assert str(ODD_SIZE) not in refused.stdout + refused.stderr
    assert "requires TLS" in run("nbdcopy", required.uri(), "null:").stderr
    before = image.read_bytes()
    assert run("qemu-io", "-f", "raw", "-c", "write 0 512", required.uri()).returncode == 1
    assert image.read_bytes() == before


def test_where_tls_is_optional_both_kinds_of_clients_are_served(
    optional: Server, identities: Identities
) -> None:
    for uri in (optional.uri(), secure(optional, identities.nobody)):
        assert check("nbdinfo", "--size", uri) == f"{ODD_SIZE}\n"


def test_a_listener_with_nbds_requires_tls_and_its_neighbour_does_not(
    identities: Identities, image: Path, tmp_path: Path
) -> None:
    outside = free_tcp_address()
    listen = [f"--listen=nbds://127.0.0.1:{outside.port}", f"--tls-certificates={identities.server}"]
    with nbdserve("-f", "raw", *listen, image, directory=tmp_path) as inside:
        assert check("nbdinfo", "--size", inside.uri()) == f"{ODD_SIZE}\n"
        assert run("nbdinfo", "--size", outside.uri()).returncode == 1
        encrypted = Server(inside.process, outside, inside.pid)
        assert check("nbdinfo", "--size", secure(encrypted, identities.nobody)) == f"{ODD_SIZE}\n"


def test_tls_works_over_a_unix_socket(identities: Identities, image: Path, tmp_path: Path) -> None:
    single = [f"--tls-{part}={identities.server}/server-{part}.pem" for part in ("cert", "key")]
    with nbdserve("-f", "raw", *single, "--tls-require", image, directory=tmp_path) as server:
        uri = server.uri().replace("nbd+unix", "nbds+unix")
        uri += f"&tls-verify-peer=0&tls-certificates={identities.nobody}"
        assert check("nbdinfo", "--size", uri) == f"{ODD_SIZE}\n"


# Who is who.


def test_only_clients_of_the_authority_are_let_in_when_peers_are_verified(
    identities: Identities, image: Path, tmp_path: Path
) -> None:
    options = [f"--tls-certificates={identities.server}", "--tls-require", "--tls-verify-peer"]
    with nbdserve("-f", "raw", *options, image, directory=tmp_path, at=free_tcp_address()) as server:
        for let_in, identity in (
            (True, identities.client),
            (False, identities.nobody),
            (False, identities.stranger),
            (True, identities.client),
        ):
            done = run("nbdinfo", "--size", secure(server, identity))
            assert (done.returncode == 0) == let_in, done.stderr
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                assert _may_list(server, identity, version) == let_in
        assert server.log.read_text().count("TLS handshake failed") == 6


def _may_list(server: Server, identity: Path, version: ssl.TLSVersion) -> bool:
    """Whether a client gets an answer inside TLS of one version."""
    context = client_context(identity)
    context.minimum_version = context.maximum_version = version
    with Wire(server.address) as wire:
        wire.greet()
        assert wire.haggle(Option.STARTTLS)[-1].kind == Reply.ACK
        try:
            encrypt(wire, context)
            # In TLS 1.3 a client learns only afterwards what the server thinks of its certificate.
            return wire.haggle(Option.LIST)[-1].kind == Reply.ACK
        except (ssl.SSLError, ConnectionError, EOFError):
            return False


def test_a_client_that_does_not_trust_the_server_goes_away_quietly(
    required: Server, identities: Identities
) -> None:
    refused = run("nbdinfo", "--size", secure(required, identities.distrustful))
    assert refused.returncode == 1
    assert check("nbdinfo", "--size", secure(required, identities.nobody)) == f"{ODD_SIZE}\n"
    assert len(required.log.read_text().splitlines()) <= 2


def _speaks(server: Server, version: ssl.TLSVersion) -> bool:
    """Whether the server agrees to a version of TLS, with a client that has no scruples."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    with Wire(server.address) as wire:
        wire.greet()
        assert wire.haggle(Option.STARTTLS)[-1].kind == Reply.ACK
        try:
            encrypt(wire, context)
        except ssl.SSLError:
            return False
        return True


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
def test_tls_1_1_is_refused_here_though_the_others_speak_it(
    required: Server, identities: Identities, image: Path, tmp_path: Path
) -> None:
    creds = f"tls-creds-x509,id=tls,endpoint=server,verify-peer=off,dir={identities.server}"
    kit = ["--tls=require", f"--tls-certificates={identities.server}", "memory", "1M"]
    with (
        qemu_nbd("--object", creds, "--tls-creds=tls", "-r", "-f", "raw", image,
                 directory=tmp_path, at=free_tcp_address()) as qemu,
        nbdkit(*kit, directory=tmp_path, at=free_tcp_address()) as kit_server,
    ):  # fmt: skip
        assert _speaks(qemu, ssl.TLSVersion.TLSv1_1)
        assert _speaks(kit_server, ssl.TLSVersion.TLSv1_1)
    assert not _speaks(required, ssl.TLSVersion.TLSv1_1)
    assert _speaks(required, ssl.TLSVersion.TLSv1_2)
    assert _speaks(required, ssl.TLSVersion.TLSv1_3)


# Much at once.


def test_copies_from_one_tls_server_to_another_are_exact(identities: Identities, tmp_path: Path) -> None:
    size = 64 * MIB + 4096
    source, target = tmp_path / "source.img", tmp_path / "target.img"
    content = random_disk(source, size)
    target.write_bytes(bytes(size))
    options = ["-f", "raw", f"--tls-certificates={identities.server}", "--tls-require"]
    with (
        nbdserve(*options, "-r", source, directory=tmp_path, at=free_tcp_address()) as near,
        nbdserve(*options, target, directory=tmp_path, at=free_tcp_address()) as far,
    ):
        copy = ["nbdcopy", "--connections=4", "--requests=32", "--threads=4", "--request-size=1048576"]
        check(*copy, secure(near, identities.nobody), secure(far, identities.nobody))
    assert target.read_bytes() == content


def test_long_reads_and_writes_cross_on_one_connection(identities: Identities, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    content = random_disk(image, 64 * MIB)
    options = ["-f", "raw", f"--tls-certificates={identities.server}", "--tls-require"]
    with nbdserve(*options, image, directory=tmp_path, at=free_tcp_address()) as server:
        client = nbd.NBD()
        client.set_uri_allow_local_file(True)
        client.connect_uri(secure(server, identities.nobody))
        cookies = []
        reads = [nbd.Buffer(MIB) for _ in range(32)]
        for index, buffer in enumerate(reads):
            cookies.append(client.aio_pread(buffer, index * MIB))
            written = nbd.Buffer.from_bytearray(bytearray(content[index * MIB : (index + 1) * MIB]))
            cookies.append(client.aio_pwrite(written, (63 - index) * MIB))
        deadline = time.monotonic() + 300
        while client.aio_in_flight() and time.monotonic() < deadline:
            client.poll(1000)
        assert client.aio_in_flight() == 0
        assert all(client.aio_command_completed(cookie) for cookie in cookies)
        assert b"".join(bytes(buffer.to_bytearray()) for buffer in reads) == content[: 32 * MIB]
        client.shutdown()
    blocks = [content[index * MIB : (index + 1) * MIB] for index in range(32)]
    assert image.read_bytes() == b"".join(blocks + blocks[::-1])


@pytest.mark.parametrize("writes", [8, 512], ids=["all sent", "still sending"])
def test_sigterm_lets_requests_in_flight_inside_tls_be_answered(
    required: Server, identities: Identities, image: Path, writes: int
) -> None:
    before = image.read_bytes()
    blocks = [bytes([index % 256]) * 4096 for index in range(writes)]
    with started(required, identities.nobody) as wire:
        assert wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK
        wire.send(*[request(Command.READ, 0, 256 * KIB, cookie=index) for index in range(64)])
        wire.send(
            *[
                request(Command.WRITE, index * 4096 + MIB, cookie=index, data=block)
                for index, block in enumerate(blocks)
            ]
        )
        required.process.signal(signal.SIGTERM)
        for index in range(64):
            assert wire.simple_reply().cookie == index
            assert wire.receive(256 * KIB) == before[: 256 * KIB]
        done = 0
        with suppress(EOFError, ConnectionResetError):
            while True:
                reply = wire.simple_reply()
                assert (reply.cookie, reply.error) == (done, 0)
                done += 1
    assert required.process.wait() == 0
    # What the server had not received when it was told to stop, it does not owe.
    assert done == writes or writes > 8
    assert image.read_bytes()[MIB : MIB + done * 4096] == b"".join(blocks[:done])


def test_a_server_killed_inside_tls_has_kept_what_it_acknowledged(
    required: Server, identities: Identities, image: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.img"
    random_disk(data, ODD_SIZE, seed=9)
    loop: list[Argument] = [
        "sh",
        "-c",
        'while nbdcopy "$0" "$1"; do echo done; done',
        data,
        secure(required, identities.nobody),
    ]
    with Process(loop, tmp_path / "loop.log") as copies:
        copies.wait_for_line("done")
        required.process.kill()
        copies.wait(20)
    assert image.read_bytes() == data.read_bytes()


# The operator's mistakes.


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--tls-require"], "--tls-cert"),
        (["--tls-verify-peer"], "--tls-cert"),
        (["--tls-cert={server}/server-cert.pem"], "--tls-key"),
        (["--tls-key={server}/server-key.pem"], "--tls-cert"),
        (["--tls-certificates={empty}"], "server-cert.pem"),
        (["--tls-certificates=/nonexistent"], "/nonexistent/server-cert.pem"),
        (["--tls-certificates={server}", "--tls-cert=x"], "--tls-cert"),
        (["--tls-cert={server}/server-cert.pem", "--tls-key={client}/client-key.pem"], "client-key.pem"),
        (["--tls-cert={server}/server-cert.pem", "--tls-key={image}"], "disk.img"),
        (["--tls-cert={image}", "--tls-key={server}/server-key.pem"], "disk.img"),
        (["--tls-cert={server}", "--tls-key={server}/server-key.pem"], "server"),
        (
            ["--tls-cert={server}/server-cert.pem", "--tls-key={server}/server-key.pem", "--tls-verify-peer"],
            "--tls-ca",
        ),
        (
            ["--tls-cert={server}/server-cert.pem", "--tls-key={server}/server-key.pem", "--tls-verify-peer",
             "--tls-ca={image}"],
            "disk.img",
        ),
        (["--listen=nbds://127.0.0.1:0"], "--tls-cert"),
        (["--listen=nbds://127.0.0.1:0?tls-certificates=/x", "--tls-certificates={server}"], "--tls-"),
    ],
)  # fmt: skip
def test_a_mistake_about_tls_is_one_line(
    identities: Identities, image: Path, tmp_path: Path, options: list[str], names: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"server": identities.server, "client": identities.client, "image": image, "empty": empty}
    filled = [text.format(**places) for text in options]
    done = run(NBDSERVE, "-f", "raw", "-k", tmp_path / "nbd.sock", *filled, image, seconds=10)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert names in done.stderr


def test_an_encrypted_key_is_an_error_and_no_question(
    identities: Identities, image: Path, tmp_path: Path
) -> None:
    key = tmp_path / "locked.pem"
    check("openssl", "ec", "-in", identities.server / "server-key.pem", "-aes128", "-passout", "pass:x",
          "-out", key)  # fmt: skip
    done = run(NBDSERVE, "-f", "raw", "-k", tmp_path / "nbd.sock", "--tls-key", key,
               "--tls-cert", identities.server / "server-cert.pem", image, seconds=10)  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "locked.pem" in done.stderr
