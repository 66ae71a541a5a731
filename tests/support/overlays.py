"""Overlay images and their daemon, in front of real sources."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nbdserve.client import Client, connect
from nbdserve.common.uri import parse_uri
from nbdserve.protocol.constants import CommandFlags
from overlay.formats.flat import create as flat
from overlay.formats.image import Backing
from overlay.formats.qed import create as qed
from tests.support.disks import KIB
from tests.support.monitors import Qmp, monitor
from tests.support.processes import Argument, Process, wait_until
from tests.support.servers import Server, UnixAddress, fresh_path

NBD_OVERLAY = Path(sys.executable).with_name("nbd-overlay")
Layout = Literal["flat", "qed"]
LAYOUTS: tuple[Layout, ...] = ("flat", "qed")
CLUSTER = {"flat": 4 * KIB, "qed": 64 * KIB}
NONE = CommandFlags(0)
SECONDS = 300.0
"""Time limit for one request of a test's guest: longer than any patience that a test gives a daemon."""


def make_overlay(path: Path, layout: Layout, size: int, *uris: str) -> Path:
    """Make an empty image on top of these sources, QED on the first only; returns its path."""
    backings = tuple(Backing(uri, raw=True) for uri in uris)
    if layout == "flat":
        flat.create(path, flat.new_header(size, backings))
    else:
        qed.create(path, qed.new_header(size, backings[0]), backings[0])
    return path


@dataclass(frozen=True)
class Daemon:
    """A running ``nbd-overlay serve``."""

    process: Process
    address: UnixAddress
    qmp_path: Path
    image: Path

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.process.log

    def uri(self) -> str:
        """The NBD URI of its export."""
        return self.address.uri()

    @contextmanager
    def guest(self) -> Iterator[Guest]:
        """A client, such as the guest's QEMU is."""
        with connect(parse_uri(self.uri()), timeout=SECONDS, contexts=None) as client:
            yield Guest(client)

    @contextmanager
    def monitor(self) -> Iterator[Qmp]:
        """A client of its monitor."""
        with monitor(self.qmp_path) as qmp:
            yield qmp

    def status(self) -> dict[str, Any]:
        """What ``query-overlay`` tells."""
        with self.monitor() as qmp:
            answer: dict[str, Any] = qmp.execute("query-overlay")
        return answer

    def wait_for_status(self, seconds: float = 30.0, **wanted: object) -> dict[str, Any]:
        """Poll ``query-overlay`` until these fields have these values, and return all of it."""
        told: dict[str, Any] = {}

        def has_come() -> bool:
            told.update(qmp.execute("query-overlay"))
            return all(told[name] == value for name, value in wanted.items())

        with self.monitor() as qmp:
            wait_until(has_come, f"{wanted} in query-overlay", seconds, 0.05)
        return told

    def wait_until_connected(self, seconds: float = 15.0) -> None:
        """Return when one of its sources is connected."""

        def is_connected() -> bool:
            told = qmp.execute("query-overlay")
            return any(source["connected"] for source in told["sources"])

        with self.monitor() as qmp:
            wait_until(is_connected, "a source is connected", seconds, 0.02)


class Guest:
    """What a guest does to its disk, each request waited for unless it is started."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def read(self, offset: int, length: int) -> bytes:
        """One request, answered."""
        data = bytearray(length)
        self.client.start_read(offset, memoryview(data)).result(SECONDS)
        return bytes(data)

    def write(self, offset: int, data: bytes, flags: CommandFlags = NONE) -> None:
        """One request, acknowledged."""
        self.client.start_write(offset, data, flags).result(SECONDS)

    def zero(self, offset: int, length: int, flags: CommandFlags = NONE) -> None:
        """One request, acknowledged."""
        self.client.start_zero(offset, length, flags).result(SECONDS)

    def trim(self, offset: int, length: int) -> None:
        """One request, acknowledged."""
        self.client.start_trim(offset, length, NONE).result(SECONDS)

    def flush(self) -> None:
        """One request, acknowledged."""
        self.client.start_flush().result(SECONDS)


@contextmanager
def overlay(
    image: Path,
    *arguments: Argument,
    directory: Path,
    wrapper: Sequence[str] = (),
    program: Sequence[Argument] = (NBD_OVERLAY,),
) -> Iterator[Daemon]:
    """The daemon of an image, ready, until the block ends. It must not have written a traceback.

    ``wrapper`` are words before the command, of a program that becomes the daemon in the end; ``program`` is
    what is started instead of nbd-overlay.
    """
    socket, qmp = fresh_path(directory, "overlay", ".sock"), fresh_path(directory, "overlay", ".qmp")
    pid_file = fresh_path(directory, "overlay", ".pid")
    argv: list[Argument] = [*wrapper, *program, "serve", image, "--verbose"]
    argv += ["--socket", socket, "--qmp", f"unix:{qmp}", "--pid-file", pid_file, *arguments]
    log = fresh_path(directory, "overlay", ".log")
    with Process(argv, log) as process:
        process.wait_for_pid_file(pid_file, 20.0)
        try:
            yield Daemon(process, UnixAddress(socket), qmp, image)
        finally:
            if process.running:
                with suppress(ProcessLookupError):
                    process.signal(signal.SIGCONT)
                assert process.terminate(30.0) == 0, process.output()
        assert "Traceback" not in process.output(), process.output()


@dataclass(frozen=True)
class Asked:
    """A request that reached a source."""

    command: str
    offset: int
    length: int


_REQUEST = re.compile(r"connection=\d+ (\w+) id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)")


def requests(log: Path, command: str = "Read") -> list[Asked]:
    """The requests of a kind in a log of nbdkit's log filter, in the order of their arrival."""
    found = _REQUEST.findall(log.read_text())
    return [Asked(name, int(offset, 16), int(count, 16)) for name, offset, count in found if name == command]


def fetched_bytes(log: Path) -> int:
    """The bytes that were read from a source behind nbdkit's log filter."""
    return sum(asked.length for asked in requests(log))


def end(server: Server, number: signal.Signals = signal.SIGKILL) -> None:
    """Kill a source and wait until it is gone."""
    server.process.signal(number)
    server.process.wait()
    if isinstance(server.address, UnixAddress):
        server.address.path.unlink(missing_ok=True)
