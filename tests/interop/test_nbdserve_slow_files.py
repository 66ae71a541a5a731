"""A file in a file system that hangs, as NFS does when its server is away: it costs those who want it."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.disks import MIB, random_disk
from tests.support.monitors import monitor
from tests.support.processes import Process, check, wait_until
from tests.support.servers import Server, free_tcp_address, fresh_path, nbdserve
from tests.support.wire import Command, Option, Reply, Wire, export_query, option, request

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK), reason="mounts a file system"
)
SECONDS = 120.0
"""How long what must not hang may take on a busy machine."""


@dataclass(frozen=True)
class Hanging:
    """A directory with two images, of which ``slow`` can be made to hang."""

    directory: Path
    daemon: Process

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """In the block it does not answer; whoever looks at it waits, the report of a failure too."""
        self.daemon.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.daemon.signal(signal.SIGCONT)


@contextmanager
def mounted(what: str, place: Path) -> Iterator[None]:
    """Something else in the place of a file until the block ends."""
    check("mount", "--bind", what, place)
    try:
        yield
    finally:
        check("umount", "--lazy", place)


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Hanging]:
    """The file ``slow`` comes from nbdfuse, which can be stopped; ``fast`` is a file as any other."""
    directory, fuse = tmp_path / "images", tmp_path / "fuse"
    directory.mkdir()
    fuse.mkdir()
    random_disk(directory / "fast", MIB)
    (directory / "slow").touch()
    random_disk(tmp_path / "disk.img", 2 * MIB)
    with (
        nbdserve("-f", "raw", tmp_path / "disk.img", directory=tmp_path) as source,
        Process(["nbdfuse", fuse / "disk", source.uri()], fresh_path(tmp_path, "nbdfuse", ".log")) as daemon,
    ):
        daemon.wait_for(fuse.is_mount, "mounted")
        try:
            with mounted(str(fuse / "disk"), directory / "slow"):
                try:
                    yield Hanging(directory, daemon)
                finally:
                    daemon.signal(signal.SIGCONT)
        finally:
            check("fusermount3", "-u", "-z", fuse)


@dataclass(frozen=True)
class Observed:
    """A server of the directory with its monitor and metrics."""

    server: Server
    qmp: Path
    metrics: int


@pytest.fixture
def observed(hanging: Hanging, tmp_path: Path) -> Iterator[Observed]:
    """It gives up looking files up after 8 s; to list what hangs takes it half of that.

    What hangs and ``works`` together are fewer than may haggle, also while some are just leaving: where too
    many haggle the oldest gives way.
    """
    port, qmp = free_tcp_address().port, tmp_path / "qmp"
    options = [
        "--handshake-timeout=8",
        "--max-handshakes=8",
        f"--metrics=127.0.0.1:{port}",
        f"--qmp=unix:{qmp}",
    ]
    with nbdserve(*options, "--directory", hanging.directory, directory=tmp_path) as server:
        yield Observed(server, qmp, port)


def works(observed: Observed) -> None:
    """Whatever has nothing to do with the slow file."""
    server = observed.server
    assert check("nbdinfo", "--size", server.uri("fast"), seconds=SECONDS) == f"{MIB}\n"
    with Wire(server.address, SECONDS) as wire:
        wire.greet()
        listed = [reply.data[4:] for reply in wire.haggle(Option.LIST)[:-1]]
        # What is about to be removed may be there still.
        assert [name for name in listed if name != b"added"] == [b"fast", b"slow"]
    with monitor(observed.qmp) as client:
        client.execute("query-block-exports")
        client.execute("x-query-clients")
    with urllib.request.urlopen(f"http://127.0.0.1:{observed.metrics}/metrics", timeout=SECONDS) as answer:
        assert b"nbdserve_connections" in answer.read()


def ask_for_slow(server: Server, clients: int) -> list[Wire]:
    """So many clients that have asked for the slow file."""
    wires = [Wire(server.address, SECONDS) for _ in range(clients)]
    for wire in wires:
        wire.send(b"\0\0\0\3", option(Option.GO, export_query("slow")))
    return wires


def close(wires: list[Wire]) -> None:
    """All of them go."""
    for wire in wires:
        wire.socket.close()


@pytest.mark.exhaustive
def test_a_file_that_hangs_costs_those_who_want_it_and_nobody_else(
    hanging: Hanging, observed: Observed
) -> None:
    server = observed.server
    with hanging.asleep():
        with Wire(server.address, SECONDS) as user:
            # It has the fast one in use, and can leave it.
            user.go("fast")
            wires = ask_for_slow(server, 3)
            works(observed)
        works(observed)
        # On a machine that is very busy the time for a handshake may be over before somebody has asked.
        late, idle = "slow': its file system has not answered for 8 s", "no export chosen within 8 s"
        wait_until(lambda: sum(map(server.process.output().count, (late, idle))) >= 3, "they are told")
        assert late in server.process.output()
        close(wires)
        # More than may haggle at a time: they keep no place.
        crowd = ask_for_slow(server, 12)
        works(observed)
        close(crowd)
        wait_until(lambda: threads(server) < 10, "but for the one that looks none is left")
    assert check("nbdinfo", "--size", server.uri("slow"), seconds=SECONDS) == f"{2 * MIB}\n"
    works(observed)
    assert server.process.terminate() == 0


def threads(server: Server) -> int:
    """How many there are in the server."""
    return len(list(Path(f"/proc/{server.pid}/task").iterdir()))


def test_a_file_that_hangs_when_it_is_opened_costs_those_who_chose_it(
    hanging: Hanging, observed: Observed
) -> None:
    server = observed.server
    wires = [Wire(server.address, SECONDS) for _ in range(3)]
    for wire in wires:
        wire.greet()
        assert wire.haggle(Option.INFO, export_query("slow"))[-1].kind == Reply.ACK
    with hanging.asleep():
        for wire in wires:
            wire.send(option(Option.GO, export_query("slow")))
        works(observed)
        close(wires)
    assert check("nbdinfo", "--size", server.uri("slow"), seconds=SECONDS) == f"{2 * MIB}\n"
    assert server.process.terminate() == 0


@pytest.mark.exhaustive
def test_a_server_ends_although_a_file_hangs(hanging: Hanging, observed: Observed) -> None:
    server = observed.server
    with hanging.asleep():
        wires = ask_for_slow(server, 3)
        works(observed)
        assert server.process.terminate(SECONDS) == 0
        close(wires)


@contextmanager
def asked(qmp: Path, command: str, **arguments: object) -> Iterator[Callable[[], dict[str, object]]]:
    """A client of the monitor that has sent a command; what is yielded waits for its answer."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as lines:
        connection.settimeout(SECONDS)
        connection.connect(str(qmp))
        for name, given in (("qmp_capabilities", {}), (command, arguments)):
            lines.readline()
            lines.write(json.dumps({"execute": name, "arguments": given}) + "\n")
            lines.flush()

        def answer() -> dict[str, object]:
            while "event" in (told := json.loads(lines.readline())):
                pass
            assert isinstance(told, dict)
            return told

        yield answer


def test_a_file_that_hangs_when_the_monitor_opens_or_closes_it_keeps_other_clients_of_the_monitor_going(
    hanging: Hanging, observed: Observed
) -> None:
    server, slow = observed.server, str(hanging.directory / "slow")
    added = {"type": "nbd", "id": "added", "filename": slow, "writable": True, "format": "raw"}
    with ExitStack() as sleeping:
        sleeping.enter_context(hanging.asleep())
        with asked(observed.qmp, "block-export-add", **added) as answer:
            works(observed)
            sleeping.close()
            assert answer() == {"return": {}}
    assert answer_of(observed, "query-block-exports") == ["added"]
    with Wire(server.address, SECONDS) as wire:
        wire.go("added")
        wire.send(request(Command.WRITE, 0, data=b"new!"))
        assert wire.simple_reply().error == 0
    wait_until(lambda: answer_of(observed, "query-block-exports", "clients") == [0], "it is not in use")
    with ExitStack() as sleeping:
        sleeping.enter_context(hanging.asleep())
        with asked(observed.qmp, "block-export-del", id="added") as answer:
            works(observed)
            sleeping.close()
            assert answer() == {"return": {}}
    assert answer_of(observed, "query-block-exports") == []
    assert server.process.terminate() == 0


def answer_of(observed: Observed, command: str, member: str = "id") -> list[object]:
    """One member of each object that a command returns."""
    with monitor(observed.qmp) as client:
        return [each[member] for each in client.execute(command)]
