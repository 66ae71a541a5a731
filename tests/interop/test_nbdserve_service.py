"""nbdserve among the services of a system: systemd, inetd, ssh, and whoever reads its log."""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import nbd
import pytest

from tests.support.activation import activated
from tests.support.disks import MIB, random_disk
from tests.support.processes import Process, check, listens, run, wait_until
from tests.support.servers import NBDSERVE, TcpAddress, UnixAddress, free_tcp_address, nbdserve
from tests.support.wire import Wire


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 1 MiB."""
    path = tmp_path / "disk.img"
    random_disk(path, MIB)
    return path


class Manager:
    """The end of NOTIFY_SOCKET where systemd sits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._sock.settimeout(60)

    def hear(self) -> dict[str, str]:
        """The next message."""
        return dict(line.split("=", 1) for line in self._sock.recv(4096).decode().splitlines())

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A service manager to report to."""
    listening = Manager(tmp_path / "notify")
    yield listening
    listening.close()


def test_sockets_of_systemd_are_served_by_the_process_that_systemd_watches(
    image: Path, tmp_path: Path
) -> None:
    tcp, unix = free_tcp_address(), UnixAddress(tmp_path / "nbd.sock")
    environment = [f"--setenv={name}" for name in ("PYTHONPATH", "NBD_TEST_RUN") if name in os.environ]
    listen = ["-l", f"{tcp.host}:{tcp.port}", "-l", str(unix.path)]
    command = ["systemd-socket-activate", *environment, *listen, str(NBDSERVE), "-f", "raw", str(image)]
    with Process(command, tmp_path / "activate.log") as process:
        process.wait_for_line("Listening on")
        wait_until(lambda: listens(unix.path), "the socket is there")
        for address in (tcp, unix):
            check("nbdcopy", address.uri(), tmp_path / "copy.img")
            assert (tmp_path / "copy.img").read_bytes() == image.read_bytes()
        assert "nbdserve" in Path(f"/proc/{process.pid}/cmdline").read_text()
        assert process.terminate() == 0
        assert unix.path.exists(), "the socket belongs to systemd"


def test_a_socket_named_qmp_is_the_monitor(image: Path, tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as clients,
        socket.create_server(str(tmp_path / "qmp.sock"), family=socket.AF_UNIX) as monitor,
        activated(["-f", "raw", image], tmp_path, monitor, clients, names="qmp:nbd") as process,
    ):
        address = TcpAddress("127.0.0.1", clients.getsockname()[1])
        assert check("nbdinfo", "--size", address.uri()) == f"{MIB}\n"
        with UnixAddress(tmp_path / "qmp.sock").connect() as connection:
            assert b'"QMP"' in connection.recv(4096)
        assert process.terminate() == 0


def test_a_connected_socket_is_the_one_client(image: Path, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with activated(["-f", "raw", image], tmp_path, theirs) as process:
        theirs.close()
        client = nbd.NBD()
        client.connect_socket(ours.detach())
        assert client.pread(512, 1000) == image.read_bytes()[1000:1512]
        client.shutdown()
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("options", "names"), [(["-k", "x"], "-k"), (["-p", "1"], "-p"), (["--fork"], "--fork")], ids=str
)
def test_what_does_not_go_with_sockets_of_systemd_is_said(
    image: Path, tmp_path: Path, options: list[str], names: str
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as sock,
        activated(["-f", "raw", *options, image], tmp_path, sock) as process,
    ):
        assert process.wait() == 2
    assert process.output().count("\n") == 1
    assert names in process.output()


def test_a_descriptor_that_is_no_socket_to_listen_on_is_named(image: Path, tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        activated(["-f", "raw", image], tmp_path, udp, names="disk") as process,
    ):
        assert process.wait() == 1
    assert process.output() == (
        "nbdserve: descriptor 3 (disk) of LISTEN_FDS: it must be a stream socket, TCP or Unix\n"
    )


def test_sockets_for_another_process_are_left_alone(image: Path, tmp_path: Path) -> None:
    given = {"LISTEN_PID": "1", "LISTEN_FDS": "1"}
    with nbdserve("-f", "raw", image, directory=tmp_path, env=given) as server:
        assert check("nbdinfo", "--size", server.uri()) == f"{MIB}\n"


def test_nbdcopy_starts_it_in_brackets(image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    for options in ([], ["--stdio"]):
        check("nbdcopy", "--", "[", NBDSERVE, *options, "-f", "raw", image, "]", copy)
        assert copy.read_bytes() == image.read_bytes()
        copy.unlink()
    copy.write_bytes(bytes(MIB))
    check("nbdcopy", "--", image, "[", NBDSERVE, "--stdio", "-f", "raw", copy, "]")
    assert copy.read_bytes() == image.read_bytes()


ENDS = {
    "one socket": 'exec "$@"',
    "two pipes": 'cat | "$@" | cat',
    "one socket that is standard error too": 'exec "$@" 2>&1',
}


@pytest.mark.parametrize("ends", ENDS)
def test_one_client_is_served_on_standard_input_and_output(image: Path, tmp_path: Path, ends: str) -> None:
    content = image.read_bytes()
    client = nbd.NBD()
    status = tmp_path / "status"
    script = f'{ENDS[ends]}; echo "${{PIPESTATUS[1]-$?}}" > {status}'.replace("exec ", "")
    client.connect_command(
        ["bash", "-c", script, "sh", str(NBDSERVE), "-v", "--stdio", "-f", "raw", str(image)]
    )
    for offset in range(0, MIB, 128 << 10):
        assert client.pread(128 << 10, offset) == content[offset : offset + (128 << 10)]
    client.pwrite(b"changed" * 100_000, 12345)
    client.flush()
    client.shutdown()
    wait_until(status.exists, "the server has ended")
    wait_until(lambda: status.read_text() == "0\n", "it has ended well")
    assert image.read_bytes()[12345 : 12345 + 700_000] == b"changed" * 100_000


def test_standard_input_that_is_no_client_is_said(image: Path, tmp_path: Path) -> None:
    with Process([NBDSERVE, "--stdio", "-f", "raw", image], tmp_path / "nbdserve.log") as process:
        assert process.wait() == 2
    assert (
        process.output() == "nbdserve: --stdio: standard input and output must be one socket, or two pipes\n"
    )


def test_a_client_on_standard_input_that_goes_away_ends_the_server(image: Path) -> None:
    done = run(NBDSERVE, "--stdio", "-f", "raw", image, seconds=10, stdin="")
    assert done.returncode == 0
    assert done.stdout.startswith("NBDMAGIC")
    assert done.stderr == "nbdserve: stdio: the client went away before it chose an export\n"


def test_systemd_is_told_of_readiness_life_and_the_end(image: Path, tmp_path: Path, manager: Manager) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "200000"}
    with nbdserve("-f", "raw", image, directory=tmp_path, env=environment) as server:
        ready = manager.hear()
        assert (ready["READY"], ready["MAINPID"]) == ("1", str(server.pid))
        assert [manager.hear() for _ in range(3)] == [{"WATCHDOG": "1"}] * 3
        with Wire(server.address) as wire:
            wire.go()
            server.process.signal(signal.SIGTERM)
            while (said := manager.hear()) == {"WATCHDOG": "1"}:
                pass
            assert said == {"STOPPING": "1"}
        assert server.process.wait() == 0


def test_a_watchdog_for_another_process_and_a_manager_that_is_gone_are_no_trouble(
    image: Path, tmp_path: Path, manager: Manager
) -> None:
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    with nbdserve("-f", "raw", image, directory=tmp_path, env=environment) as server:
        assert manager.hear()["READY"] == "1"
        manager.close()
        manager.path.unlink()
        assert check("nbdinfo", "--size", server.uri()) == f"{MIB}\n"
        assert server.process.terminate() == 0
    with nbdserve("-f", "raw", image, directory=tmp_path, env=environment) as server:
        assert "NOTIFY_SOCKET" in server.process.output()
        assert check("nbdinfo", "--size", server.uri()) == f"{MIB}\n"


def test_a_json_log_has_one_object_on_each_line(image: Path, tmp_path: Path) -> None:
    address = free_tcp_address()
    options = ["-f", "raw", "-v", "--log-format=json"]
    with nbdserve(*options, image, directory=tmp_path, at=address) as server:
        with Wire(address) as wire:
            name = "{}:{}".format(*wire.socket.getsockname())
            wire.send(b"\n\n\nGET / HTTP/1.1\r\n\r\n")
            wire.receive(18)
            assert wire.is_closed_by_server()
        assert check("nbdinfo", "--size", server.uri()) == f"{MIB}\n"
        assert server.process.terminate() == 0
        records = [json.loads(line) for line in server.process.output().splitlines()]
    for record in records:
        assert set(record) == {"time", "level", "client", "message"}
        age = datetime.now(UTC) - datetime.fromisoformat(record["time"])
        assert 0 <= age.total_seconds() < 60
    assert {"info", "debug"} >= {record["level"] for record in records}
    assert any(record["client"] == name for record in records)
    assert any(record["client"] is None and "serving" in record["message"] for record in records)


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def _identities(pid: int) -> set[tuple[str, ...]]:
    """The user ids, group ids and groups of every thread of a process, without repetition."""
    found: set[tuple[str, ...]] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = dict(
            line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line
        )
        found.add((lines["Uid"], lines["Gid"], lines["Groups"].strip(), lines["CapEff"]))
    return found


@root_only
def test_privileges_are_dropped_when_everything_is_open_and_the_image_is_served_all_the_same(
    image: Path, tmp_path: Path
) -> None:
    image.chmod(0o600)
    user = pwd.getpwnam("nobody")
    options = ["-f", "raw", "--user=nobody", "--metrics=127.0.0.1:0", f"--qmp=unix:{tmp_path}/qmp"]
    with nbdserve(*options, image, directory=tmp_path) as server, Wire(server.address) as wire:
        wire.go()
        ids, groups = "\t".join([str(user.pw_uid)] * 4), "\t".join([str(user.pw_gid)] * 4)
        assert _identities(server.pid) == {(ids, groups, str(user.pw_gid), "0" * 16)}
        check("nbdcopy", server.uri(), tmp_path / "copy.img")
        assert (tmp_path / "copy.img").read_bytes() == image.read_bytes()
        assert server.process.terminate() == 0


@root_only
def test_a_group_alone_leaves_the_user_and_takes_all_other_groups(image: Path, tmp_path: Path) -> None:
    options = ["-f", "raw", "--group=65534"]
    # The pid file is written by who it was; clients are served by who it is then.
    with nbdserve(*options, image, directory=tmp_path) as server, Wire(server.address) as wire:
        wire.go()
        ((uid, gid, groups, _),) = _identities(server.pid)
        assert (uid.split(), gid.split(), groups) == (["0"] * 4, ["65534"] * 4, "65534")


@root_only
def test_who_is_not_root_can_become_nobody_else(image: Path, tmp_path: Path) -> None:
    image.chmod(0o666)
    unprivileged = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    options = ["-f", "raw", "-k", str(tmp_path / "nbd.sock"), "--user=daemon"]
    done = run(*unprivileged, NBDSERVE, *options, image, seconds=10)
    assert done.returncode == 1
    assert done.stderr == "nbdserve: --user and --group: only root can become somebody else\n"
