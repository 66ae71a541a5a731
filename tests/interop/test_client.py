"""The NBD client against stock servers, and against peers that hang, talk nonsense or die."""

from __future__ import annotations

import errno
import select
import signal
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.client import connect
from nbdserve.client.libnbd import nbd
from nbdserve.common.errors import ConnectError
from nbdserve.common.uri import NbdUri, Tls, parse_uri
from nbdserve.protocol.extents import Extent
from tests.support.disks import MIB, random_disk, sparse_disk, sparse_runs
from tests.support.processes import PATIENCE
from tests.support.servers import TcpAddress, free_tcp_address, nbdkit, qemu_nbd

HOLE = 3


@contextmanager
def listening() -> Iterator[tuple[socket.socket, NbdUri]]:
    """A TCP socket that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server, NbdUri("127.0.0.1", server.getsockname()[1])


def test_reading_returns_what_is_on_the_disk(tmp_path: Path) -> None:
    content = random_disk(tmp_path / "disk", 9 * MIB)
    with (
        qemu_nbd("-r", "-f", "raw", tmp_path / "disk", directory=tmp_path) as server,
        connect(parse_uri(server.uri())) as client,
    ):
        assert client.size == len(content)
        assert client.export.read_only
        assert client.read(0, len(content)) == content
        assert client.read(len(content) - 1, 1) == content[-1:]
        assert client.read(5, 0) == b""


def test_extents_show_data_and_holes_and_cover_exactly_the_range(tmp_path: Path) -> None:
    runs = sparse_runs(4 * MIB)
    sparse_disk(tmp_path / "disk", runs)
    with (
        qemu_nbd("-r", "-f", "raw", tmp_path / "disk", directory=tmp_path) as server,
        connect(parse_uri(server.uri())) as client,
    ):
        assert client.extents(0, client.size) == [Extent(run.length, 0 if run.data else HOLE) for run in runs]
        assert client.extents(1 * MIB + 1, 1000) in ([Extent(1000, 0)], [Extent(1000, HOLE)])
        assert client.extents(0, 0) == []


def test_a_disk_of_many_tebibytes_is_described_in_bounded_requests(tmp_path: Path) -> None:
    with nbdkit("null", "size=9T", directory=tmp_path) as server, connect(parse_uri(server.uri())) as client:
        runs = client.extents(9 * 1024**4 - 3 * 1024**3 - 7, 3 * 1024**3 + 7)
        assert sum(run.length for run in runs) == 3 * 1024**3 + 7
        assert {run.flags for run in runs} == {HOLE}


def test_without_structured_replies_everything_counts_as_data(tmp_path: Path) -> None:
    with (
        nbdkit("--no-sr", "memory", "1001", directory=tmp_path) as server,
        connect(parse_uri(server.uri())) as client,
    ):
        assert not client.export.has_extents
        assert client.extents(1, 1000) == [Extent(1000, 0)]
        assert client.read(1, 1000) == bytes(1000)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_tcp_servers_are_reached_by_name_and_by_address(tmp_path: Path, host: str) -> None:
    address = free_tcp_address("::1" if ":" in host else "127.0.0.1")
    with (
        nbdkit("memory", "1M", directory=tmp_path, at=address),
        connect(parse_uri(TcpAddress(host, address.port).uri("any name"))) as client,
    ):
        assert client.size == MIB


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass on what arrives until the end."""
    while data := source.recv(65536):
        sink.sendall(data)


def test_a_socket_in_the_abstract_namespace_is_reached(tmp_path: Path) -> None:
    """No stock server listens there, so a relay stands before one."""
    with nbdkit("memory", "1M", directory=tmp_path) as server, socket.socket(socket.AF_UNIX) as listener:
        name = f"\0{uuid.uuid4()}"
        uri = NbdUri(socket=name)
        listener.bind(name)
        listener.listen()

        def relay() -> None:
            near, far = listener.accept()[0], server.connect()
            threading.Thread(target=pump, args=(far, near), daemon=True).start()
            pump(near, far)

        threading.Thread(target=relay, daemon=True).start()
        with connect(uri) as client:
            assert client.size == MIB


def test_tls_with_a_pre_shared_key_is_spoken_and_a_wrong_key_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alice:00112233445566778899aabbccddeeff\n")
    (tmp_path / "wrong").write_text("alice:ffeeddccbbaa99887766554433221100\n")
    tls = ("--tls=require", f"--tls-psk={tmp_path / 'keys'}")
    with nbdkit(*tls, "memory", "1M", directory=tmp_path) as server:
        uri = server.uri("disk").replace("nbd+unix://", "nbds+unix://alice@")
        with connect(parse_uri(f"{uri}&tls-psk-file={tmp_path / 'keys'}")) as client:
            assert client.read(0, 512) == bytes(512)
        with pytest.raises(ConnectError):
            connect(parse_uri(f"{uri}&tls-psk-file={tmp_path / 'wrong'}"))
        with pytest.raises(ConnectError):
            connect(parse_uri(server.uri("disk")))


def test_what_libnbd_would_not_verify_is_refused_before_connecting() -> None:
    for uri in (
        NbdUri(socket="/s", tls=Tls()),
        NbdUri("127.0.0.1", 1, tls=Tls(hostname="elsewhere")),
        parse_uri("nbds://127.0.0.1:1/?tls-type=anon"),
    ):
        with pytest.raises(ConnectError, match="libnbd"):
            connect(uri)


def test_an_export_that_the_server_lacks_is_named_in_the_error(tmp_path: Path) -> None:
    random_disk(tmp_path / "disk", 512)
    with (
        qemu_nbd("-r", "-x", "a", "-f", "raw", tmp_path / "disk", directory=tmp_path) as server,
        pytest.raises(ConnectError, match="no export named 'b'"),
    ):
        connect(parse_uri(server.uri("b")))


class Behindhand(nbd.NBD):  # type: ignore[misc]
    """A handle whose thread comes to its socket only when the server has spoken already, as under load."""

    def aio_connect_socket(self, sock: int) -> None:
        """Wait for that first."""
        assert select.select([sock], [], [], PATIENCE)[0]
        super().aio_connect_socket(sock)


def test_a_server_that_fails_before_libnbd_looks_at_its_socket_is_told_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket is libnbd's to close then. To close it twice could close a descriptor of another thread."""
    monkeypatch.setattr(nbd, "NBD", Behindhand)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        server.listen()

        def answer() -> None:
            with server.accept()[0] as peer:
                peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConnectError, match="NBD magic"):
            connect(NbdUri(socket=str(tmp_path / "socket")))
        thread.join()


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        (NbdUri(socket="/nowhere/socket"), "No such file"),
        (NbdUri("127.0.0.1", 1), "Connection refused"),
        (NbdUri("no-such-host.invalid"), "not known|looked up|Temporary failure"),
    ],
)
def test_a_server_that_is_not_there_is_a_connect_error(uri: NbdUri, complaint: str) -> None:
    with pytest.raises(ConnectError, match=complaint) as caught:
        connect(uri, timeout=20)
    assert str(caught.value).startswith(str(uri))
    assert "\n" not in str(caught.value)


def test_a_server_that_says_nothing_is_given_up() -> None:
    with listening() as (_, uri), pytest.raises(ConnectError, match=r"no answer within 0\.2 s"):
        connect(uri, timeout=0.2)


def test_a_unix_socket_whose_queue_is_full_is_given_up(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as other:
        server.bind(path)
        server.listen(0)
        other.connect(path)
        with pytest.raises(ConnectError, match=r"no answer within 0\.2 s"):
            connect(NbdUri(socket=path), timeout=0.2)


@pytest.mark.parametrize(
    "greeting", [b"SSH-2.0-OpenSSH_9.2\r\n", b"NBDMAGIC" + bytes(8), b"", b"NBDMAGICIHAVEOPT"]
)
def test_a_peer_that_is_no_nbd_server_is_a_connect_error(greeting: bytes) -> None:
    with listening() as (server, uri):

        def greet() -> None:
            with server.accept()[0] as peer:
                peer.sendall(greeting)

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        with pytest.raises(ConnectError):
            connect(uri, timeout=20)
        thread.join(120)


def test_a_read_error_of_the_server_keeps_its_errno_and_the_connection(tmp_path: Path) -> None:
    trigger = tmp_path / "fail"
    failing = ("--filter=error", "memory", "1M", "error-pread=ENOSPC", "error-pread-rate=1.0")
    with (
        nbdkit(*failing, f"error-file={trigger}", directory=tmp_path) as server,
        connect(parse_uri(server.uri())) as client,
    ):
        trigger.touch()
        with pytest.raises(OSError) as caught:
            client.read(0, 512)
        assert caught.value.errno == errno.ENOSPC
        trigger.unlink()
        assert client.read(0, 512) == bytes(512)


def test_a_server_that_stops_answering_is_an_error_in_time_and_never_data(tmp_path: Path) -> None:
    with (
        nbdkit("memory", "1M", directory=tmp_path) as server,
        connect(parse_uri(server.uri()), silence=2) as client,
    ):
        server.process.freeze()
        with pytest.raises(TimeoutError, match=r"no answer within 2 s"):
            client.read(0, 512)
        server.process.signal(signal.SIGCONT)
        with pytest.raises(OSError) as caught:
            client.read(0, 512)
        assert caught.value.errno == errno.ENOTCONN


def test_a_server_that_dies_is_an_error_at_once_and_ever_after(tmp_path: Path) -> None:
    with (
        nbdkit("memory", "1M", directory=tmp_path) as server,
        connect(parse_uri(server.uri())) as client,
    ):
        server.process.kill()
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                client.read(0, 512)
            assert caught.value.errno == errno.ENOTCONN
            with pytest.raises(OSError):
                client.extents(0, 512)


def test_a_range_outside_the_export_is_refused(tmp_path: Path) -> None:
    with nbdkit("memory", "1M", directory=tmp_path) as server, connect(parse_uri(server.uri())) as client:
        for offset, length in ((MIB, 1), (-1, 1), (0, MIB + 1), (5, -1)):
            for request in (client.read, client.extents):
                with pytest.raises(OSError) as caught:
                    request(offset, length)
                assert caught.value.errno == errno.EINVAL
