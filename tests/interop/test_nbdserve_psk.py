"""TLS with keys that are shared beforehand, as libnbd, QEMU and OpenSSL do it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from nbdserve.client import connect
from nbdserve.common.errors import ConnectError
from nbdserve.common.uri import parse_uri
from nbdserve.protocol.constants import CommandFlags
from tests.support.disks import MIB, random_disk
from tests.support.processes import check, run
from tests.support.servers import NBDSERVE, Server, TcpAddress, free_tcp_address, nbdserve

pytestmark = pytest.mark.skipif(sys.version_info < (3, 13), reason="before Python 3.13 there is no PSK")
KEYS = "alice:00112233445566778899aabbccddeeff\nbob:{}\n".format("5a" * 64)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A directory with the file that QEMU looks for in it; a client and the server have the same."""
    directory = tmp_path / "keys"
    directory.mkdir()
    (directory / "keys.psk").write_text(KEYS)
    return directory / "keys.psk"


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """What is on the disk."""
    return random_disk(tmp_path / "disk.img", MIB)


@pytest.fixture
def server(tmp_path: Path, keys: Path, content: bytes) -> Iterator[Server]:
    """A server that serves nobody without a key."""
    options = ["-f", "raw", f"--tls-psk={keys}", "--tls-require", str(tmp_path / "disk.img")]
    with nbdserve(*options, directory=tmp_path, at=free_tcp_address()) as running:
        yield running


def secure(server: Server, user: str, keys: Path) -> str:
    """The URI of its disk for this user."""
    assert isinstance(server.address, TcpAddress)
    return f"nbds://{user}@127.0.0.1:{server.address.port}/?tls-psk-file={quote(str(keys))}"


@pytest.mark.parametrize("user", ["alice", "bob"])
def test_libnbd_and_our_own_client_read_and_write_with_a_key(
    server: Server, tmp_path: Path, keys: Path, content: bytes, user: str
) -> None:
    uri = secure(server, user, keys)
    assert check("nbdinfo", "--size", uri) == f"{MIB}\n"
    check("nbdcopy", uri, tmp_path / "copy.img")
    assert (tmp_path / "copy.img").read_bytes() == content
    with connect(parse_uri(uri)) as client:
        client.start_write(4096, b"x" * 4096, CommandFlags(0)).result(120)
        assert client.read(0, 8192) == content[:4096] + b"x" * 4096


def test_qemu_reads_and_writes_with_a_key(server: Server, tmp_path: Path, keys: Path, content: bytes) -> None:
    assert isinstance(server.address, TcpAddress)
    creds = f"tls-creds-psk,id=key,dir={keys.parent},endpoint=client,username=alice"
    options = f"driver=nbd,host=127.0.0.1,port={server.address.port},tls-creds=key"
    check(
        "qemu-img", "convert", "--object", creds, "--image-opts", options, "-O", "raw", tmp_path / "copy.img"
    )
    assert (tmp_path / "copy.img").read_bytes() == content
    commands = ("-c", "write -P 7 1000 5000", "-c", "read -P 7 1000 5000", "-c", "flush")
    check("qemu-io", "--object", creds, "--image-opts", options, *commands)


def test_what_the_documentation_says_is_done_as_it_stands(tmp_path: Path, content: bytes) -> None:
    page = " ".join((Path(__file__).parents[2] / "docs/nbdserve.md").read_text().split())
    made, served, opened = re.findall(r"`([^`]*(?:-p |--tls-psk |tls-psk-file=)[^`]*)`", page)
    keys, address = tmp_path / "keys.psk", free_tcp_address()
    here = made.replace("/etc/nbd/keys.psk", str(keys)), served.replace("/etc/nbd/keys.psk", str(keys))
    check(*here[0].split())
    options = ["-f", "raw", *here[1].split(), str(tmp_path / "disk.img")]
    with nbdserve(*options, directory=tmp_path, at=address):
        uri = opened.replace("HOST", f"127.0.0.1:{address.port}").replace("PATH", quote(str(keys)))
        assert check("nbdinfo", "--size", uri) == f"{MIB}\n"


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_both_versions_of_tls_agree_on_a_key(server: Server, keys: Path, version: str) -> None:
    assert isinstance(server.address, TcpAddress)
    key = KEYS.partition(":")[2][:32]
    done = run(sys.executable, "-c", CLIENT, str(server.address.port), version, key)
    assert done.returncode == 0, done.stdout + done.stderr


CLIENT = """
import socket, ssl, struct, sys
port, version, key = int(sys.argv[1]), sys.argv[2], bytes.fromhex(sys.argv[3])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.minimum_version = context.maximum_version = {
    "-tls1_2": ssl.TLSVersion.TLSv1_2, "-tls1_3": ssl.TLSVersion.TLSv1_3}[version]
context.set_ciphers("PSK")
context.set_psk_client_callback(lambda hint: ("alice", key))
with socket.create_connection(("127.0.0.1", port), 60) as plain:
    assert len(plain.recv(18, socket.MSG_WAITALL)) == 18
    plain.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 5, 0))
    assert struct.unpack(">QIII", plain.recv(20, socket.MSG_WAITALL))[2] == 1
    with context.wrap_socket(plain) as secure:
        assert secure.version() == {"-tls1_2": "TLSv1.2", "-tls1_3": "TLSv1.3"}[version]
        secure.sendall(struct.pack(">QII", 0x49484156454F5054, 3, 0))
        assert len(secure.recv(20)) == 20
"""


@pytest.mark.parametrize(
    ("user", "other"),
    [
        ("alice", "alice:ffeeddccbbaa99887766554433221100\n"),
        ("mallory", "mallory:00112233445566778899aabb\n"),
    ],
)
def test_who_has_another_key_or_is_not_known_is_not_served(
    server: Server, tmp_path: Path, user: str, other: str
) -> None:
    (tmp_path / "wrong").write_text(other)
    with pytest.raises(ConnectError):
        connect(parse_uri(secure(server, user, tmp_path / "wrong")))
    server.process.wait_for_line("TLS handshake failed")
    assert "Traceback" not in server.process.output()


def test_who_does_not_encrypt_is_served_unless_keys_are_required(
    server: Server, tmp_path: Path, keys: Path, content: bytes
) -> None:
    assert isinstance(server.address, TcpAddress)
    plain = f"nbd://127.0.0.1:{server.address.port}/"
    assert run("nbdinfo", "--size", plain).returncode != 0
    with nbdserve(
        "-f", "raw", "-r", f"--tls-psk={keys}", tmp_path / "disk.img", directory=tmp_path
    ) as offering:
        assert check("nbdinfo", "--size", offering.uri()) == f"{MIB}\n"


def test_keys_and_certificates_exclude_each_other(tmp_path: Path, keys: Path, content: bytes) -> None:
    for options in (["--tls-certificates=/"], ["--tls-cert=/c", "--tls-key=/k"], ["--tls-verify-peer"]):
        argv = ["-f", "raw", f"--tls-psk={keys}", *options, str(tmp_path / "disk.img")]
        done = run(NBDSERVE, "-k", tmp_path / "sock", *argv)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "--tls-psk takes the place of certificates" in done.stderr
