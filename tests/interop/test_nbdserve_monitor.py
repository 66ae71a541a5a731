"""Live control of nbdserve with the clients that QEMU's operators use, and with some that mean no good."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbd
import pytest
from qemu.qmp import ExecuteError

from nbdserve.backends.imagelocks import EXCLUSIVE, READER, ImageLocks
from nbdserve.connection.listeners import listen_unix
from nbdserve.qmp.endpoint import Monitor
from tests.support.disks import MIB, random_disk
from tests.support.monitors import Qmp, monitor
from tests.support.processes import check, run, wait_until
from tests.support.servers import Server, UnixAddress, nbdserve
from tests.support.wire import Command, Wire, request

QMP_SHELL = Path(sys.executable).with_name("qmp-shell")


@dataclass(frozen=True)
class Controlled:
    """A server with a monitor."""

    server: Server
    socket: UnixAddress
    directory: Path

    def uri(self, export: str = "") -> str:
        """The NBD URI of an export."""
        return self.server.uri(export)


@contextmanager
def controlled_server(directory: Path) -> Iterator[Controlled]:
    """A server of one export with the name and id ``disk``; an image beside it is not served."""
    random_disk(directory / "disk.img", MIB)
    random_disk(directory / "other.img", 2 * MIB, seed=2)
    path = directory / "qmp.sock"
    options = ["--export", f"disk={directory}/disk.img,format=raw", f"--qmp=unix:{path}"]
    with nbdserve(*options, directory=directory) as server:
        yield Controlled(server, UnixAddress(path), directory)


@pytest.fixture
def controlled(tmp_path: Path) -> Iterator[Controlled]:
    """A server for one test."""
    with controlled_server(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def unimpressed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controlled]:
    """A server for tests that leave it as it is."""
    with controlled_server(tmp_path_factory.mktemp("unimpressed")) as running:
        yield running


@pytest.fixture
def qmp(controlled: Controlled) -> Iterator[Qmp]:
    """A client of its monitor."""
    with monitor(controlled.socket.path) as connected:
        yield connected


def names(controlled: Controlled) -> list[str]:
    """The exports that a client is told of."""
    listed = json.loads(check("nbdinfo", "--list", "--json", controlled.uri()))
    return [export["export-name"] for export in listed["exports"]]


def test_an_export_is_added_and_removed_while_another_is_in_use(controlled: Controlled, qmp: Qmp) -> None:
    other = controlled.directory / "other.img"
    with Wire(controlled.server.address) as busy:
        busy.go("disk")
        qmp.execute(
            "block-export-add", type_="nbd", id_="e1", name="more", filename=str(other), format_="raw"
        )
        assert names(controlled) == ["disk", "more"]
        check("nbdcopy", controlled.uri("more"), controlled.directory / "copy.img")
        assert (controlled.directory / "copy.img").read_bytes() == other.read_bytes()
        qmp.execute("block-export-del", id_="e1")
        event = qmp.event()
        assert (event["event"], event["data"]) == ("BLOCK_EXPORT_DELETED", {"id": "e1"})
        assert set(event["timestamp"]) == {"seconds", "microseconds"}
        assert names(controlled) == ["disk"]
        busy.send(request(Command.READ, 0, 512, cookie=1))
        assert busy.simple_reply().cookie == 1
    assert run("nbdinfo", controlled.uri("more")).returncode != 0
    # Nobody holds the image any more: QEMU may have it to itself.
    check("qemu-io", "-f", "raw", "-c", "write 0 512", other)


def test_exports_are_told_as_qemu_tells_them(controlled: Controlled, qmp: Qmp) -> None:
    other = str(controlled.directory / "other.img")
    qmp.execute(
        "block-export-add",
        type_="nbd",
        id_="rw",
        filename=other,
        format_="raw",
        writable=True,
        description="it",
    )
    with Wire(controlled.server.address) as wire:
        wire.go("disk")
        wire.send(request(Command.FLUSH))
        assert wire.simple_reply().error == 0
        disk, added = qmp.execute("query-block-exports")
    assert disk == {
        "id": "disk",
        "type": "nbd",
        "node-name": "disk",
        "shutting-down": False,
        "name": "disk",
        "description": "",
        "size": MIB,
        "writable": True,
        "clients": 1,
    }
    assert (added["id"], added["name"], added["writable"], added["description"]) == ("rw", "rw", True, "it")
    client = nbd.NBD()
    client.connect_uri(controlled.uri("rw"))
    client.pwrite(b"written", 0)
    client.shutdown()
    assert Path(other).read_bytes()[:7] == b"written"


def test_an_export_in_use_is_removed_only_by_force(controlled: Controlled, qmp: Qmp) -> None:
    with Wire(controlled.server.address) as wire:
        wire.go("disk")
        for _ in range(2):
            wire.send(request(Command.READ, 0, 512, cookie=1))
            assert wire.simple_reply().cookie == 1
            wire.receive(512)
            with pytest.raises(ExecuteError, match="'disk' is in use by 1 clients"):
                qmp.execute("block-export-del", id_="disk")
        qmp.execute("block-export-del", id_="disk", mode="hard")
        assert wire.is_closed_by_server()
    assert qmp.event()["data"] == {"id": "disk"}
    assert qmp.execute("query-block-exports") == []
    assert names(controlled) == []
    qmp.execute(
        "block-export-add",
        type_="nbd",
        id_="disk",
        filename=str(controlled.directory / "disk.img"),
        format_="raw",
    )
    assert check("nbdinfo", "--size", controlled.uri("disk")) == f"{MIB}\n"


def test_removal_by_force_loses_no_acknowledged_write(controlled: Controlled, qmp: Qmp) -> None:
    acknowledged = []
    with Wire(controlled.server.address) as wire:
        wire.go("disk")

        def write() -> None:
            try:
                for number in range(1_000_000):
                    wire.send(request(Command.WRITE, 0, cookie=number, data=number.to_bytes(8, "big")))
                    acknowledged.append(wire.simple_reply().cookie)
            except (OSError, EOFError):
                pass

        writer = threading.Thread(target=write)
        writer.start()
        wait_until(lambda: len(acknowledged) > 100, "writes are under way")
        qmp.execute("block-export-del", id_="disk", mode="hard")
        qmp.event()
        stored = int.from_bytes((controlled.directory / "disk.img").read_bytes()[:8], "big")
        writer.join()
    assert stored in (acknowledged[-1], acknowledged[-1] + 1)


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("nonsense", {}, "CommandNotFound", "The command nonsense has not been found"),
    ("qmp_capabilities", {}, "CommandNotFound", "already complete"),
    ("block-export-add", {"type": "nbd"}, "GenericError", "Parameter 'id' is missing"),
    (
        "block-export-add",
        {"type": "nbd", "id": "x", "node-name": "n"},
        "GenericError",
        "'node-name' is unexpected",
    ),
    ("block-export-add", {"type": "nbd", "id": 1, "filename": "x"}, "GenericError", "'id', expected: string"),
    ("block-export-add", {"type": "vhost", "id": "x", "filename": "x"}, "GenericError", "'vhost'"),
    (
        "block-export-add",
        {"type": "nbd", "id": "x", "filename": "none.img"},
        "GenericError",
        "none.img: No such",
    ),
    (
        "block-export-add",
        {"type": "nbd", "id": "x", "filename": "/dev/null"},
        "GenericError",
        "/dev/null: not a",
    ),
    (
        "block-export-add",
        {"type": "nbd", "id": "x", "filename": "F", "format": "tar"},
        "GenericError",
        "'tar'",
    ),
    ("block-export-add", {"type": "nbd", "id": "disk", "filename": "F"}, "GenericError", "'disk'"),
    (
        "block-export-add",
        {"type": "nbd", "id": "x", "name": "disk", "filename": "F"},
        "GenericError",
        "'disk'",
    ),
    ("block-export-add", {"type": "nbd", "id": "x", "filename": "F", "offset": -1}, "GenericError", "'-1'"),
    (
        "block-export-add",
        {"type": "nbd", "id": "x", "filename": "F", "name": "n" * 5000},
        "GenericError",
        "4096",
    ),
    ("block-export-add", {"type": "nbd", "id": "x", "filename": "a\0b"}, "GenericError", "'filename'"),
    ("block-export-add", {"type": "nbd", "id": "\ud800", "filename": "F"}, "GenericError", "'id'"),
    ("block-export-del", {"id": "none"}, "GenericError", "there is no export with the id 'none'"),
    ("block-export-del", {"id": "disk", "mode": "soft"}, "GenericError", "'soft'"),
    ("x-disconnect-client", {"id": 4711}, "GenericError", "there is no client 4711"),
    ("x-disconnect-client", {"id": True}, "GenericError", "'id', expected: integer"),
]


@pytest.mark.parametrize(("command", "arguments", "kind", "names"), REFUSED)
def test_what_cannot_be_done_is_said_and_changes_nothing(
    unimpressed: Controlled, command: str, arguments: dict[str, Any], kind: str, names: str
) -> None:
    other = unimpressed.directory / "other.img"
    given = {key: str(other) if value == "F" else value for key, value in arguments.items()}
    with monitor(unimpressed.socket.path) as qmp:
        before = qmp.execute("query-block-exports")
        with pytest.raises(ExecuteError) as refused:
            qmp.execute(command, **given)
        assert refused.value.error_class == kind
        assert names in str(refused.value)
        assert qmp.execute("query-block-exports") == before
    # Nothing is left open.
    check("qemu-io", "-f", "raw", "-c", "write 0 512", other)


def test_an_image_that_others_are_kept_from_writing_to_is_added_for_reading_only(
    controlled: Controlled, qmp: Qmp
) -> None:
    image = controlled.directory / "other.img"
    wanted = {"type_": "nbd", "id_": "x", "filename": str(image), "format_": "raw"}
    with image.open("rb") as opened:
        ImageLocks(opened.fileno(), str(image)).hold(READER, EXCLUSIVE)
        with pytest.raises(ExecuteError, match="the image is in use"):
            qmp.execute("block-export-add", writable=True, **wanted)
        qmp.execute("block-export-add", **wanted)


def test_clients_are_told_with_their_traffic_and_can_be_disconnected(
    controlled: Controlled, qmp: Qmp
) -> None:
    with Wire(controlled.server.address) as first, Wire(controlled.server.address) as second:
        first.go("disk")
        first.send(request(Command.READ, 0, 4096), request(Command.WRITE, 0, data=b"x" * 1000))
        first.send(request(Command.READ, MIB, 1))
        assert [first.simple_reply().error, len(first.receive(4096))] == [0, 4096]
        assert [first.simple_reply().error, first.simple_reply().error] == [0, 22]
        second.greet()
        told, haggling = qmp.execute("x-query-clients")
        assert {
            key: told[key] for key in ("export", "tls", "requests", "errors", "read-bytes", "written-bytes")
        } == {
            "export": "disk",
            "tls": False,
            "requests": 3,
            "errors": 1,
            "read-bytes": 4096,
            "written-bytes": 1000,
        }
        assert haggling["export"] is None
        assert told["client"].startswith("unix:")
        qmp.execute("x-disconnect-client", id_=told["id"])
        assert first.is_closed_by_server()
        wait_until(lambda: len(qmp.execute("x-query-clients")) == 1, "it is gone")
        qmp.execute("x-disconnect-client", id_=haggling["id"])
        assert second.is_closed_by_server()
    output = controlled.server.process.output
    wait_until(lambda: output().count("disconnected through the monitor") == 2, "both are in the log")


def test_quit_ends_the_server_in_good_order(controlled: Controlled, qmp: Qmp) -> None:
    with Wire(controlled.server.address) as wire:
        wire.go("disk")
        wire.send(request(Command.WRITE, 0, data=b"the last write"))
        assert wire.simple_reply().error == 0
        assert qmp.execute("quit") == {}
        assert wire.is_closed_by_server()
    event = qmp.event()
    assert (event["event"], event["data"]["reason"]) == ("SHUTDOWN", "host-qmp-quit")
    assert controlled.server.process.wait() == 0
    assert (controlled.directory / "disk.img").read_bytes().startswith(b"the last write")
    assert not controlled.socket.path.exists()


def test_qmp_shell_works_unchanged(controlled: Controlled) -> None:
    script = "query-version\nquery-block-exports\nblock-export-del id=disk\nquit\n"
    done = run(QMP_SHELL, controlled.socket.path, stdin=script, seconds=20)
    assert '"package": "nbdserve 0.' in done.stdout
    assert '"node-name": "disk"' in done.stdout
    assert controlled.server.process.wait() == 0


def test_only_the_owner_may_open_the_monitor(controlled: Controlled) -> None:
    assert controlled.socket.path.stat().st_mode & 0o777 == 0o600


def talk(connection: socket.socket, *sent: bytes) -> list[dict[str, Any]]:
    """Send, and return the line that comes back for each part."""
    answers = []
    lines = connection.makefile("rb")
    for part in sent:
        connection.sendall(part)
        answers.append(json.loads(lines.readline()))
    return answers


CAPABILITIES = b'{"execute":"qmp_capabilities"}'
VERSION = b'{"execute":"query-version","id":[1,{"a":null}]}'


def test_commands_are_found_however_they_are_sent(controlled: Controlled) -> None:
    with controlled.socket.connect() as connection:
        lines = connection.makefile("rb")
        assert "QMP" in json.loads(lines.readline())
        pretty = json.dumps({"execute": "query-version", "id": 'a "}{" \\'}, indent=4).encode()
        connection.sendall(CAPABILITIES + VERSION + b"\r\n\r\n" + pretty + b" " + VERSION)
        for byte in VERSION + pretty:
            connection.sendall(bytes([byte]))
        ids = [json.loads(lines.readline()).get("id") for _ in range(6)]
        assert ids == [None, [1, {"a": None}], 'a "}{" \\', [1, {"a": None}], [1, {"a": None}], 'a "}{" \\']


def test_nothing_is_done_before_capabilities_are_negotiated(unimpressed: Controlled) -> None:
    with unimpressed.socket.connect() as connection:
        greeting, early, wrong, oob, fine = talk(
            connection,
            b"",
            b'{"execute":"quit"}',
            b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":1}',
            b'{"execute":"qmp_capabilities","arguments":{"disable":[]}}',
            CAPABILITIES,
        )
        assert greeting["QMP"]["capabilities"] == []
        assert early["error"]["class"] == "CommandNotFound"
        assert (wrong["id"], wrong["error"]["class"]) == (1, "GenericError")
        assert "error" in oob
        assert fine == {"return": {}}
    assert unimpressed.server.process.running


def test_nonsense_is_answered_and_the_next_command_is_carried_out(unimpressed: Controlled) -> None:
    nonsense = [
        b"hello\n",
        b"}{",
        b"]\n",
        b"[1,2]",
        b'{"execute" "x"}',
        b'{"execute":"x",}',
        b"{}",
        b'{"execute":7}',
        b'{"execute":"query-version","arguments":[]}',
        b'{"execute":"query-version","more":1}',
        b'{"\xff":1}',
        b'{"execute":' + b"9" * 5000 + b"}",
        b'{"execute":"\\ud800"}',
        b"nothing \x00 \xfe\n",
    ]
    with unimpressed.socket.connect() as connection:
        talk(connection, b"", CAPABILITIES)
        for sent in nonsense:
            answer = talk(connection, sent)[0]
            assert "error" in answer, (sent, answer)
            if sent == b"}{":
                connection.sendall(b'"execute":"query-version"}')
                assert "return" in json.loads(connection.makefile("rb").readline())
            assert "return" in talk(connection, VERSION)[0], sent


def send_on(connection: socket.socket, data: bytes) -> None:
    """Send the same again and again, until that fails."""
    for _ in range(1000):
        connection.sendall(data)


ENDLESS = {
    "a line": b"x" * 65536,
    "a string": b'{"execute":"' + b"x" * 65536,
    "an object": b'{"a":1,' + b'"b":2,' * 10_000,
    "brackets": b"[" * 65536,
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_client_that_never_ends_is_cut_off(controlled: Controlled, qmp: Qmp, what: str) -> None:
    with controlled.socket.connect() as connection:
        connection.sendall(CAPABILITIES)
        with pytest.raises(ConnectionError):
            send_on(connection, ENDLESS[what])
        assert qmp.execute("query-block-exports")
    peak = Path(f"/proc/{controlled.server.pid}/status").read_text().partition("VmHWM:")[2].split()[0]
    assert int(peak) < 60 * 1024, "in KiB"


def test_monitor_clients_do_not_wait_for_each_other(controlled: Controlled, qmp: Qmp) -> None:
    asking = b'{"execute":"query-commands"}' * 100
    with controlled.socket.connect(2) as deaf, controlled.socket.connect() as dead:
        dead.sendall(b'{"execute":')
        dead.close()
        deaf.sendall(CAPABILITIES)
        with pytest.raises(TimeoutError):
            send_on(deaf, asking)
        assert len(qmp.execute("query-block-exports")) == 1
        # It is owed events as well, and gets the rest when it listens at last.
        assert json.loads(deaf.makefile("rb").readline())["QMP"]


def test_more_monitor_clients_than_are_served_wait(controlled: Controlled) -> None:
    connections = [controlled.socket.connect(1) for _ in range(17)]
    assert all(b"QMP" in connection.recv(4096) for connection in connections[:16])
    with pytest.raises(TimeoutError):
        connections[16].recv(1)
    connections[3].close()
    connections[16].settimeout(60)
    assert b"QMP" in connections[16].recv(4096)
    for connection in connections:
        connection.close()


def test_a_deaf_monitor_client_does_not_keep_the_server_from_ending(controlled: Controlled) -> None:
    with controlled.socket.connect(1) as deaf:
        deaf.sendall(CAPABILITIES)
        with pytest.raises(TimeoutError):
            send_on(deaf, b'{"execute":"query-commands"}' * 100)
        assert controlled.server.process.terminate() == 0


def test_a_client_that_does_not_read_its_events_is_cut_off(tmp_path: Path) -> None:
    address = UnixAddress(tmp_path / "qmp.sock")
    listener = listen_unix(str(address.path))
    own = Monitor(listener, "test", {"count": lambda: None})
    own.start()
    try:
        with address.connect() as deaf, monitor(address.path) as attentive:
            talk(deaf, b"", CAPABILITIES)
            for number in range(100):
                own.emit("LONG", {"number": number, "padding": "x" * 50_000})
                assert attentive.event()["data"]["number"] == number
            received = 0
            while part := deaf.recv(1 << 20):
                received += len(part)
            assert received < 4_000_000
    finally:
        own.close()
        listener.close()
