"""NBD servers, ours and the stock ones, on a Unix socket or a free TCP port of the loopback."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from tests.support.processes import Argument, Process

NBDSERVE = Path(sys.executable).with_name("nbdserve")


@dataclass(frozen=True)
class UnixAddress:
    """A Unix socket's path."""

    path: Path

    def uri(self, export: str = "") -> str:
        """The NBD URI of an export at this address."""
        return f"nbd+unix:///{quote(export, safe='')}?socket={quote(str(self.path))}"

    def connect(self, seconds: float = 60.0) -> socket.socket:
        """A connected socket with a time limit on each of its operations."""
        connection = socket.socket(socket.AF_UNIX)
        # Without Python's own time limit connect() waits while the listen queue is full.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), 0))
        connection.connect(str(self.path))
        connection.settimeout(seconds)
        return connection


@dataclass(frozen=True)
class TcpAddress:
    """A host and a port; an IPv6 host stands without brackets."""

    host: str
    port: int

    def uri(self, export: str = "") -> str:
        """The NBD URI of an export at this address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}:{self.port}/{quote(export, safe='')}"

    def connect(self, seconds: float = 60.0) -> socket.socket:
        """A connected socket with a time limit on each of its operations."""
        return socket.create_connection((self.host, self.port), seconds)


Address = UnixAddress | TcpAddress


PORTS = range(20_000, 32_000)
"""Below those that Linux gives to whoever connects without having asked for one."""


def free_tcp_address(host: str = "127.0.0.1") -> TcpAddress:
    """An address of this machine on which nothing listens, and which no other test gets while we live.

    Other test runs on this machine ask for locks on the same files.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    directory = Path(tempfile.gettempdir()) / f"nbd-migrate-test-ports-{os.geteuid()}"
    directory.mkdir(exist_ok=True)
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        # Stays open, and locked, until this process ends.
        held = os.open(directory / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket(family) as probe:
                probe.bind((host, port))
        except OSError:
            os.close(held)
            continue
        return TcpAddress(host, port)
    raise AssertionError(f"no port of {host} is free")


@dataclass(frozen=True)
class Server:
    """A running server that has said that it is ready."""

    process: Process
    address: Address
    pid: int

    @property
    def log(self) -> Path:
        """Where the server's output goes."""
        return self.process.log

    def uri(self, export: str = "") -> str:
        """The NBD URI of one of its exports."""
        return self.address.uri(export)

    def connect(self) -> socket.socket:
        """A raw connection to it."""
        return self.address.connect()


def fresh_path(directory: Path, stem: str, suffix: str) -> Path:
    """A path in the directory that does not exist yet."""
    candidates = (directory / f"{stem}{number}{suffix}" for number in itertools.count(1))
    return next(path for path in candidates if not path.exists())


@contextmanager
def _served(
    argv: list[Argument],
    address: Address,
    directory: Path,
    pid_option: str,
    environment: dict[str, str],
    words: int = 1,
) -> Iterator[Server]:
    """Run a server in the foreground until the block ends; its pid file says when it is ready.

    The first ``words`` of its command line are the program.
    """
    program = Path(argv[0]).name
    pid_file = fresh_path(directory, program, ".pid")
    command = [*argv[:words], pid_option, pid_file, *argv[words:]]
    with Process(command, fresh_path(directory, program, ".log"), env=environment) as process:
        process.wait_for_pid_file(pid_file)
        yield Server(process, address, int(pid_file.read_text()))


@contextmanager
def nbdserve(
    *arguments: Argument,
    directory: Path,
    at: Address | None = None,
    env: dict[str, str] | None = None,
    program: Sequence[Argument] = (NBDSERVE,),
) -> Iterator[Server]:
    """Our server; on a Unix socket in the directory unless another address is given.

    ``program`` are the words that start it.

    Whatever its clients did to it, it must not have written a traceback.
    """
    address = at or UnixAddress(fresh_path(directory, "nbdserve", ".sock"))
    argv = [*program, *_listen(address), *arguments]
    with _served(argv, address, directory, "--pid-file", env or {}, len(program)) as server:
        yield server
        assert "Traceback" not in server.process.output(), server.process.output()


@contextmanager
def qemu_nbd(
    *arguments: Argument, directory: Path, at: Address | None = None, persistent: bool = True
) -> Iterator[Server]:
    """``qemu-nbd``; with ``persistent`` for any number of clients, otherwise it ends after the last one."""
    address = at or UnixAddress(fresh_path(directory, "qemu-nbd", ".sock"))
    lasting = ["--persistent", "--shared=0"] if persistent else []
    argv = ["qemu-nbd", *_listen(address), *lasting, *arguments]
    with _served(argv, address, directory, "--pid-file", {}) as server:
        yield server


@contextmanager
def nbdkit(*arguments: Argument, directory: Path, at: Address | None = None) -> Iterator[Server]:
    """``nbdkit`` in the foreground; the arguments are its plugin and what follows it."""
    address = at or UnixAddress(fresh_path(directory, "nbdkit", ".sock"))
    match address:
        case UnixAddress(path):
            listen: list[Argument] = ["--unix", path]
        case TcpAddress(host, port):
            listen = ["--ipaddr", host, "--port", str(port)]
    with _served(
        ["nbdkit", "--foreground", *listen, *arguments], address, directory, "--pidfile", {}
    ) as server:
        yield server


@contextmanager
def nbd_server(
    image: Path,
    *,
    directory: Path,
    at: Address | None = None,
    export: str = "disk",
    read_only: bool = False,
    identity: Path | None = None,
) -> Iterator[Server]:
    """``nbd-server`` with one export. It knows no default export: clients must name it.

    ``identity`` is the directory of its certificate, if it is to require TLS.
    """
    address = at or UnixAddress(fresh_path(directory, "nbd-server", ".sock"))
    match address:
        case UnixAddress(path):
            listen = f"unixsock = {path}"
        case TcpAddress(host, port):
            listen = f"listenaddr = {host}\nport = {port}"
    if identity is not None:
        listen += f"\nforce_tls = true\ncertfile = {identity}/server-cert.pem"
        listen += f"\nkeyfile = {identity}/server-key.pem\ncacertfile = {identity}/ca-cert.pem"
    config = fresh_path(directory, "nbd-server", ".conf")
    config.write_text(
        f"[generic]\n{listen}\n[{export}]\nexportname = {image}\nreadonly = {str(read_only).lower()}\n"
    )
    pid_file = fresh_path(directory, "nbd-server", ".pid")
    # It always becomes a daemon, so a shell stands in its place and ends it when the test does.
    guard = """sleep infinity & trap 'kill $(cat "$2") $!' TERM; nbd-server -C "$1" -p "$2"; wait"""
    log = fresh_path(directory, "nbd-server", ".log")
    with Process(["sh", "-c", guard, "sh", config, pid_file], log, death_signal=signal.SIGTERM) as process:
        try:
            process.wait_for_pid_file(pid_file)
            yield Server(process, address, int(pid_file.read_text()))
        finally:
            process.terminate()


def _listen(address: Address) -> list[Argument]:
    """The options of nbdserve and qemu-nbd for an address."""
    match address:
        case UnixAddress(path):
            return ["--socket", path]
        case TcpAddress(host, port):
            return ["--bind", host, "--port", str(port)]
