"""A tunnel between two hosts by way of a real sshd that forbids all forwarding, and what may become of it."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

import psutil
import pytest

from recipes.connections.listen import control_of
from recipes.connections.tunnel import Lead, Orders
from recipes.hosts.host import Host, module
from tests.support.guests import short_directory
from tests.support.processes import Process, dying_with_parent, listens, wait_until
from tests.support.servers import NBDSERVE, UnixAddress
from tests.support.sshd import Sshd, sshd

LIMIT = 60.0
TOOLS = str(Path(NBDSERVE).parent)
FORBIDDING = ("AllowTcpForwarding no", "AllowStreamLocalForwarding no", "MaxSessions 4")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Sshd]:
    """The sshd of the host on which a tunnel's clients arrive."""
    greeting = "ForceCommand echo 'Welcome!'; printf 'no end'; eval \"$SSH_ORIGINAL_COMMAND\""
    with sshd(tmp_path, greeting, *FORBIDDING) as made:
        yield made


@pytest.fixture
def runtime() -> Iterator[Path]:
    """Where the sockets are."""
    with short_directory() as directory:
        yield directory


def orders(server: Sshd, runtime: Path, *, at: int = 1, **changes: str) -> Orders:
    """What comes to ``entry`` on B, behind ssh, is led to ``exit`` on this machine, which is A; or back."""
    lead = Lead("the test", at, str(runtime / "entry"), str(runtime / "exit"), **changes)
    b = Host("B", server.prefix, TOOLS, address="ssh://b", options=("-o", "ServerAliveInterval=1"))
    return Orders((Host("A"), b), (lead,), LIMIT)


@contextmanager
def tunnel(server: Sshd, runtime: Path, *, at: int = 1, **changes: str) -> Iterator[Process]:
    """Run it, and wait until it stands."""
    words = [str(runtime / "ready"), orders(server, runtime, at=at, **changes).to_json()]
    command = [sys.executable, "-P", "-m", "recipes.connections.tunnel", *words]
    log, environment = server.directory / "tunnel.log", {"XDG_RUNTIME_DIR": str(runtime)}
    with Process(command, log, env=environment, death_signal=signal.SIGTERM) as made:
        made.wait_for((runtime / "ready").exists, "the tunnel stands", LIMIT)
        yield made


@contextmanager
def echo(runtime: Path) -> Iterator[None]:
    """Who answers at the tunnel's other end: with all that comes, and what was served before that."""
    program = (
        "import socket, sys, threading\n"
        "def serve(c):\n"
        "    while d := c.recv(1 << 16):\n"
        "        c.sendall(d)\n"
        "    c.close()\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(64)\n"
        "while True:\n"
        "    c, _ = s.accept()\n"
        "    threading.Thread(target=serve, args=(c,), daemon=True).start()\n"
    )
    with Process([sys.executable, "-c", program, str(runtime / "exit")], runtime / "echo.log"):
        wait_until(lambda: listens(runtime / "exit"), "somebody answers", LIMIT)
        yield


def connected(runtime: Path) -> socket.socket:
    """A client."""
    return UnixAddress(runtime / "entry").connect(LIMIT * 4)


def answered(client: socket.socket, data: bytes) -> bytes:
    """What comes back."""
    client.sendall(data)
    got = bytearray()
    while len(got) < len(data) and (piece := client.recv(1 << 16)):
        got += piece
    return bytes(got)


def goes_through(runtime: Path) -> bool:
    """Whether a new client is answered."""
    with suppress(OSError), connected(runtime) as client:
        return answered(client, b"there?") == b"there?"
    return False


def sessions(runtime: Path) -> list[psutil.Process]:
    """The processes of ssh that this tunnel has started."""
    every = psutil.process_iter(["cmdline"])
    return [each for each in every if str(runtime) in (line := " ".join(each.info["cmdline"] or []))
            and ("[mux]" in line or line.startswith("ssh "))]  # fmt: skip


def test_clients_are_led_through_an_sshd_that_forbids_all_forwarding(server: Sshd, runtime: Path) -> None:
    with echo(runtime), tunnel(server, runtime) as made:
        entry = runtime / "entry"
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600
        assert stat.S_IMODE(Path(control_of(str(entry))).stat().st_mode) == 0o600
        data = os.urandom(1 << 16)
        with connected(runtime) as first, connected(runtime) as second, connected(runtime) as third:
            # More than one connection allows: ssh makes another.
            for client in (third, first, second):
                assert answered(client, data) == data
        os.kill(made.pid, signal.SIGTERM)
        assert made.wait(LIMIT) == 0, made.output()
        assert not entry.exists()
        assert not Path(control_of(str(entry))).exists()
    wait_until(lambda: not sessions(runtime), "every session has ended", LIMIT)
    assert "Traceback" not in made.output()


def test_clients_of_this_machine_are_led_to_the_other_host(server: Sshd, runtime: Path) -> None:
    with echo(runtime), tunnel(server, runtime, at=0), connected(runtime) as first:
        with connected(runtime) as second:
            assert answered(second, b"second") == b"second"
        assert answered(first, b"first") == b"first"


def test_what_one_side_says_last_arrives_and_its_end_is_told(server: Sshd, runtime: Path) -> None:
    program = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(8)\n"
        "while True:\n"
        "    c, _ = s.accept(); c.recv(5); c.sendall(b'x' * (1 << 20) + b'end'); c.close()\n"
    )
    with Process([sys.executable, "-c", program, str(runtime / "exit")], runtime / "exit.log"):
        wait_until(lambda: listens(runtime / "exit"), "somebody answers", LIMIT)
        with tunnel(server, runtime), connected(runtime) as client:
            client.sendall(b"begin")
            got = bytearray()
            while piece := client.recv(1 << 16):
                got += piece
            assert got == b"x" * (1 << 20) + b"end"


def test_a_client_for_whom_nobody_is_there_is_let_go_of(server: Sshd, runtime: Path) -> None:
    with tunnel(server, runtime) as made:
        with connected(runtime) as client:
            assert client.recv(1) == b""
        made.wait_for_line(f"{runtime / 'exit'}: No such file or directory", LIMIT)
        with echo(runtime):
            assert goes_through(runtime)


def test_a_connection_that_is_lost_is_made_again(server: Sshd, runtime: Path) -> None:
    with echo(runtime), tunnel(server, runtime) as made:
        with connected(runtime) as client:
            assert answered(client, b"1") == b"1"
            for process in sessions(runtime):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            with suppress(ConnectionError):
                assert client.recv(1) == b"", "a client is told of the end"
        wait_until(lambda: goes_through(runtime), "it is there again", LIMIT)
        assert made.output().count("is there again") == 1, made.output()


def test_an_end_that_does_not_know_that_it_was_cut_off_gives_way(server: Sshd, runtime: Path) -> None:
    with echo(runtime), tunnel(server, runtime), connected(runtime) as old:
        assert answered(old, b"old") == b"old"
        # As after a cable was pulled: the other side of the first tunnel's connection still waits.
        with second(server, runtime), connected(runtime) as new:
            assert answered(new, b"new") == b"new"
            with suppress(ConnectionError):
                assert old.recv(1) == b"", "the old clients are told of the end"


@contextmanager
def second(server: Sshd, runtime: Path) -> Iterator[Process]:
    """Another tunnel at the same place."""
    words = [str(runtime / "ready2"), orders(server, runtime).to_json()]
    command = [sys.executable, "-P", "-m", "recipes.connections.tunnel", *words]
    with Process(command, server.directory / "second.log", env={"XDG_RUNTIME_DIR": str(runtime)}) as made:
        made.wait_for((runtime / "ready2").exists, "it stands", LIMIT)
        yield made


def test_a_tunnel_that_cannot_stand_says_why_in_one_line(server: Sshd, runtime: Path) -> None:
    (runtime / "entry").touch()
    words = [str(runtime / "ready"), orders(server, runtime).to_json()]
    command = [sys.executable, "-P", "-m", "recipes.connections.tunnel", *words]
    with Process(command, server.directory / "tunnel.log", env={"XDG_RUNTIME_DIR": str(runtime)}) as made:
        assert made.wait(LIMIT) == 1
        [line] = made.output().splitlines()
    assert "the tunnel for the test: B does not listen" in line
    assert "cannot listen: Address already in use" in line


def test_a_tunnel_that_is_killed_leaves_no_socket(server: Sshd, runtime: Path) -> None:
    with tunnel(server, runtime) as made:
        os.kill(made.pid, signal.SIGKILL)
        wait_until(lambda: not (runtime / "entry").exists(), "its end on B has gone", LIMIT)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_socket_is_whose_it_should_be(server: Sshd, runtime: Path) -> None:
    with tunnel(server, runtime, owner="nobody", mode="0660"):
        status = (runtime / "entry").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o660, 65534)


def test_clients_wait_where_a_tunnels_end_has_no_descriptors_left(runtime: Path) -> None:
    entry = runtime / "entry"
    words = [*dying_with_parent(signal.SIGKILL), *module("listen", str(entry), "", "")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as end, ExitStack() as stack:
        assert end.stdin
        assert end.stdout
        assert json.loads(end.stdout.readline()) == {"connected": True}
        hard = resource.prlimit(end.pid, resource.RLIMIT_NOFILE)[1]
        taken = {int(each) for each in os.listdir(f"/proc/{end.pid}/fd")}
        free = next(number for number in count() if number not in taken)
        resource.prlimit(end.pid, resource.RLIMIT_NOFILE, (free + 1, hard))
        for _ in range(3):
            stack.enter_context(connected(runtime))
        assert json.loads(end.stdout.readline()) == {"accepted": 1}
        waiting = "a client cannot be accepted: Too many open files"
        assert json.loads(end.stdout.readline()) == {"waiting": waiting}
        for number in (1, 2):
            end.stdin.write(b"drop %d\n" % number)
            end.stdin.flush()
            # That it waits again is no news.
            assert json.loads(end.stdout.readline()) == {"accepted": number + 1}
