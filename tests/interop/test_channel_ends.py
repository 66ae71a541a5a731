"""Both ends of a channel as processes of their own: what is led through, who may die, how they part."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from nbdserve.client.libnbd import nbd
from tests.support.disks import MIB, random_bytes
from tests.support.processes import Argument, Process, run, wait_until
from tests.support.servers import NBDSERVE, UnixAddress, free_tcp_address, fresh_path

LOADED = b"\0\1\0\4\0\0\0\0"
"""What QEMU says on the return path when it has loaded everything."""


class Ends:
    """A disk at the source, and both ends, each of which may be started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.content = random_bytes(4 * MIB)
        self.disk = directory / "a.raw"
        self.disk.write_bytes(self.content)
        self.token = directory / "token"
        self.token.touch(mode=0o600)
        self.token.write_text("0123456789abcdef" * 4)
        address = free_tcp_address()
        self.place = f"{address.host}:{address.port}"
        self.disks, self.ram, self.incoming = (directory / name for name in ("disks", "ram", "incoming"))
        self.stack = ExitStack()

    def listen(self) -> Process:
        """Start the destination's end."""
        more = ("--listen", self.place, "--socket", self.disks, "--incoming", f"unix:{self.incoming}")
        return self._started("b", *more)

    def connect(self, *options: Argument) -> Process:
        """Start the source's end, and wait until it is connected."""
        exports = options or ("--export", f"vm={self.disk},format=raw")
        started = self._started("a", "--connect", self.place, "--ram", f"unix:{self.ram}", *exports)
        # It has heard that it is accepted; the other end may be about to take note of that.
        wait_until(lambda: self.ask("b", "query-channel")["connected"], "both are connected")
        return started

    def _started(self, name: str, *words: Argument) -> Process:
        ready = self.directory / f"{name}.pid"
        own = ("--token-file", self.token, "--qmp", f"unix:{self.monitor(name)}", "--pid-file", ready)
        log = fresh_path(self.directory, name, ".log")
        started = self.stack.enter_context(Process([NBDSERVE, "channel", *words, *own], log))
        wait_until(lambda: ready.exists() and int(ready.read_text()) == started.pid, f"{name} is ready")
        return started

    def monitor(self, name: str) -> Path:
        """The socket of the monitor of an end."""
        return self.directory / f"{name}.qmp"

    def ask(self, name: str, command: str, /, **arguments: object) -> Any:
        """What the monitor of an end answers."""
        qmp = QEMUMonitorProtocol(str(self.monitor(name)))
        qmp.connect()
        try:
            return qmp.cmd(command, **{key.replace("_", "-"): value for key, value in arguments.items()})
        finally:
            # It may have ended by now.
            with suppress(EOFError):
                qmp.close()

    def is_read(self, content: bytes | None = None, name: str = "vm") -> bool:
        """Whether the disk is read through the channel as it is."""
        handle, client = nbd.NBD(), UnixAddress(self.disks).connect()
        client.settimeout(None)
        handle.set_export_name(name)
        handle.connect_socket(client.detach())
        size = handle.get_size()
        read = b"".join(bytes(handle.pread(min(MIB, size - at), at)) for at in range(0, size, MIB))
        handle.shutdown()
        return read == (self.content if content is None else content)

    def is_read_again(self) -> bool:
        """The same, of a client that may come too early."""
        try:
            return self.is_read()
        except (nbd.Error, OSError):
            return False

    def waiting_qemu(self) -> socket.socket:
        """Be the QEMU at the destination."""
        qemu = self.stack.enter_context(socket.socket(socket.AF_UNIX))
        qemu.bind(str(self.incoming))
        qemu.listen()
        qemu.settimeout(20.0)
        return qemu

    def sending_qemu(self) -> socket.socket:
        """Be the QEMU at the source."""
        qemu = self.stack.enter_context(socket.socket(socket.AF_UNIX))
        qemu.settimeout(20.0)
        qemu.connect(str(self.ram))
        return qemu


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    """A disk, and nobody there yet."""
    made = Ends(tmp_path)
    with made.stack:
        yield made


def test_clients_of_the_socket_read_the_source_s_disk_and_both_ends_part(ends: Ends) -> None:
    b, a = ends.listen(), ends.connect()
    assert oct(ends.disks.stat().st_mode & 0o777) == oct(ends.ram.stat().st_mode & 0o777) == "0o600"
    assert ends.is_read()
    told = ends.ask("b", "query-channel")
    assert (told["connected"], told["connections"], told["ram"]) == (True, 1, "none")
    ends.ask("b", "channel-done")
    assert (b.wait(20.0), a.wait(20.0)) == (0, 0)
    assert not [each for each in ends.directory.iterdir() if each.is_socket() or each.suffix == ".pid"]


@pytest.mark.parametrize("victim", ["a", "b"])
def test_an_end_that_was_killed_is_started_again_as_it_was(ends: Ends, victim: str) -> None:
    started = {"b": ends.listen, "a": ends.connect}
    there = {name: start() for name, start in started.items()}
    assert ends.is_read()
    there[victim].kill()
    again = started[victim]()
    wait_until(ends.is_read_again, "the disk is read again", 30.0)
    ends.ask("b", "channel-done")
    rest = there["b" if victim == "a" else "a"]
    assert (again.wait(20.0), rest.wait(20.0)) == (0, 0)


@pytest.mark.parametrize("victim", ["a", "b"])
def test_an_end_that_is_stopped_ends_alone(ends: Ends, victim: str) -> None:
    there = {"b": ends.listen(), "a": ends.connect()}
    there[victim].signal(signal.SIGTERM)
    assert there[victim].wait(20.0) == 0
    other = there["b" if victim == "a" else "a"]
    assert other.running
    other.signal(signal.SIGTERM)
    assert other.wait(20.0) == 0


def test_ram_is_led_to_the_waiting_qemu_and_a_second_time_when_it_has_failed(ends: Ends) -> None:
    ends.listen()
    ends.connect()
    waits = ends.waiting_qemu()
    sends = ends.sending_qemu()
    sends.sendall(b"QEVM")
    takes = waits.accept()[0]
    assert takes.recv(4) == b"QEVM"
    # It ends without a word of success.
    takes.close()
    assert sends.recv(16) == b""
    assert ends.ask("b", "query-channel")["ram"] == "failed"
    again = ends.sending_qemu()
    again.sendall(b"QEVM again")
    takes = waits.accept()[0]
    assert takes.recv(10) == b"QEVM again"
    takes.sendall(LOADED)
    assert again.recv(8) == LOADED
    again.close()
    assert takes.recv(1) == b""
    takes.close()
    wait_until(lambda: ends.ask("b", "query-channel")["ram"] == "loaded", "it is loaded")
    assert ends.is_read(), "the disk is still there"


def test_exports_are_replaced_while_the_connection_stays(ends: Ends) -> None:
    ends.listen()
    ends.connect()
    assert ends.is_read()
    other = random_bytes(MIB)
    (ends.directory / "other.raw").write_bytes(other)
    ends.ask("a", "block-export-del", id="vm", mode="hard")
    file = {"type": "nbd", "id": "vm", "name": "vm", "filename": str(ends.directory / "other.raw")}
    ends.ask("a", "block-export-add", **file, format="raw")
    assert ends.is_read(other)
    assert ends.ask("b", "query-channel")["connections"] == 1


def test_who_comes_while_nobody_is_connected_is_hung_up_on(ends: Ends) -> None:
    b = ends.listen()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20.0)
        client.connect(str(ends.disks))
        assert client.recv(1) == b""
    assert b.running


def test_another_token_is_refused_in_one_line(ends: Ends) -> None:
    ends.listen()
    other = ends.directory / "other"
    other.touch(mode=0o600)
    other.write_text("fedcba9876543210" * 4)
    words = ("--connect", ends.place, "--ram", f"unix:{ends.ram}", "--token-file", other)
    done = run(NBDSERVE, "channel", *words, seconds=30.0)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("give both ends the same --token-file")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--listen", "192.0.2.1:1", "--socket", "/x", "--token-file", "TOKEN"), "give --tls-certificates"),
        (("--listen", "unix:c", "--socket", "c", "--token-file", "TOKEN"), "the same file as --listen"),
        (("--listen", "unix:c", "--socket", "s", "--token-file", "TOKEN", "--tls-certificates", "/nowhere"),
         "/nowhere/ca-cert.pem: No such file or directory"),
        (("--ram", "unix:r", "--connect", "unix:c", "--token-file", "TOKEN", "--qmp", "unix:r"),
         "the same file as --ram"),
        (("--listen", "x:1"), "--listen needs --socket PATH"),
        (("--listen", "127.0.0.1:1", "--socket", "/x", "--token-file", "TOKEN", "--incoming", "/y"),
         "--incoming /y: write unix:PATH"),
        (("--ram", "unix:/x"), "--ram needs --connect PLACE"),
        (("--ram", "/x", "--connect", "127.0.0.1:1", "--token-file", "TOKEN"), "--ram /x: write unix:PATH"),
        (("--ram", "unix:/x", "--connect", "192.0.2.1:1", "--token-file", "TOKEN"), "give --tls-cert"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_one_line(ends: Ends, words: tuple[str, ...], said: str) -> None:
    given = [str(ends.token) if word == "TOKEN" else word for word in words]
    done = run(NBDSERVE, "channel", *given, seconds=30.0)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert said in line


def test_in_the_background_the_command_returns_when_it_is_ready(ends: Ends) -> None:
    b = ("--listen", ends.place, "--socket", ends.disks, "--token-file", ends.token, "--fork")
    a = ("--connect", ends.place, "--ram", f"unix:{ends.ram}", "--token-file", ends.token, "--fork",
         "--export", f"vm={ends.disk},format=raw")  # fmt: skip
    found = []
    try:
        for name, words in (("b", b), ("a", a)):
            ready = ends.directory / f"{name}.pid"
            done = run(NBDSERVE, "channel", *words, "--pid-file", ready, seconds=30.0)
            assert done.returncode == 0, done.stderr
            found.append(int(ready.read_text()))
        assert ends.is_read()
    finally:
        for pid in found:
            os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not list(ends.directory.glob("*.pid")), "both have ended")


def test_signals_that_come_one_upon_the_other_end_the_destinations_end_in_good_order(ends: Ends) -> None:
    b = ends.listen()
    with suppress(ProcessLookupError):
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(b.pid, number)
    # The last of them may come when Python has given its handlers back, and nothing is left to be done.
    assert b.wait(30.0) in (0, -signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT)
    assert not ends.disks.exists()
