"""``python -m tests.bench.channel``: the single channel beside two plain TCP connections, and demand under
load.

RAM is zeros from a process in QEMU's place, to another that takes them; the disk is read over NBD by this
process, which is also the destination's end, as nbd-overlay is. Both ways take turns; medians are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nbdserve.client.libnbd import nbd
from tests.support.channels import SIZE, Scene
from tests.support.processes import dying_with_parent, listens, wait_until
from tests.support.servers import free_tcp_address, nbdserve

_PIECE = 256 << 10
_DEPTH = 16
_BLOCK = 4096
_SETTLE = 0.3
_FEED = "import os\nb = bytes(1 << 16)\nwhile True: os.write(1, b)"
_SINK = """
import mmap, socket, struct, sys
kind, place, path = sys.argv[1:]
listener = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
listener.bind(place if kind == "unix" else ("127.0.0.1", int(place)))
listener.listen()
peer, _ = listener.accept()
buffer, moved = bytearray(1 << 20), 0
with open(path, "r+b") as file:
    counter = mmap.mmap(file.fileno(), 8)
    while count := peer.recv_into(buffer):
        moved += count
        counter[:] = struct.pack("=q", moved)
"""


@dataclass(frozen=True)
class Case:
    """What moves."""

    name: str
    ram: bool
    disk: bool


CASES = (
    Case("RAM and disk", ram=True, disk=True),
    Case("RAM alone", ram=True, disk=False),
    Case("disk alone", ram=False, disk=True),
    Case("idle", ram=False, disk=False),
)


@dataclass(frozen=True)
class Result:
    """Bytes a second, and seconds."""

    ram: float
    disk: float
    latencies: list[float]

    @property
    def p99(self) -> float:
        """The latency that one of a hundred exceeds."""
        return sorted(self.latencies)[len(self.latencies) * 99 // 100]

    @property
    def p50(self) -> float:
        """The usual latency."""
        return statistics.median(self.latencies)


class Sink:
    """A process that takes RAM where QEMU would, and counts it."""

    def __init__(self, directory: Path, kind: str, place: str) -> None:
        path = directory / "count"
        path.write_bytes(bytes(8))
        self._process = subprocess.Popen(
            [*dying_with_parent(signal.SIGKILL), sys.executable, "-c", _SINK, kind, place, str(path)]
        )
        with path.open("rb") as file:
            self._counter = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)

    @property
    def moved(self) -> int:
        """How many bytes have come."""
        return int(struct.unpack("=q", self._counter[:])[0])

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Reader:
    """A thread that reads the disk over and over, with many requests under way."""

    def __init__(self, connect: Callable[[], nbd.NBD]) -> None:
        self.moved = 0
        self._stopped = False
        self._handle = connect()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._stopped = True
        self._thread.join(10)

    def _run(self) -> None:
        at = 0
        # Used again and again: the binding of Debian 12 never frees one.
        free, flying = deque(nbd.Buffer(_PIECE) for _ in range(_DEPTH)), deque[tuple[int, nbd.Buffer]]()
        with contextlib.suppress(nbd.Error):
            while not self._stopped:
                while free:
                    buffer = free.popleft()
                    flying.append((self._handle.aio_pread(buffer, at), buffer))
                    at = (at + _PIECE) % SIZE
                while not self._handle.aio_command_completed(flying[0][0]):
                    self._handle.poll(-1)
                free.append(flying.popleft()[1])
                self.moved += _PIECE


@contextlib.contextmanager
def feeding(descriptor: int, case: Case) -> Iterator[None]:
    """A process in QEMU's place sends RAM, if the case says so."""
    process = (
        subprocess.Popen([*dying_with_parent(signal.SIGKILL), sys.executable, "-c", _FEED], stdout=descriptor)
        if case.ram
        else None
    )
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def through_channel(directory: Path, case: Case, seconds: float) -> Result:
    """Over the channel."""
    with Scene(directory, listens_for_qemu=False) as scene:
        sink = Sink(directory, "unix", str(scene.incoming))
        wait_until(lambda: listens(scene.incoming), "the sink")
        place = f"127.0.0.1:{scene.port}"
        source = scene.send_with(["--connect", place, *scene.options()[2:]])
        wait_until(lambda: scene.status.ram == "under-way", "the channel")
        with feeding(source.stream, case):
            result = measured(sink, case, scene.client, seconds)
        sink.close()
        return result


def plain(directory: Path, case: Case, seconds: float) -> Result:
    """Over two TCP connections."""
    image, port = directory / "disk", free_tcp_address().port
    image.write_bytes(bytes(range(256)) * (SIZE // 256))
    sink = Sink(directory, "tcp", str(port))
    with contextlib.ExitStack() as stack:
        stack.callback(sink.close)
        at = free_tcp_address()
        server = stack.enter_context(nbdserve("-r", "-f", "raw", image, directory=directory, at=at))
        out = stack.enter_context(connected(port))

        def connect() -> nbd.NBD:
            handle = nbd.NBD()
            handle.connect_uri(server.uri())
            return handle

        stack.enter_context(feeding(out.fileno(), case))
        return measured(sink, case, connect, seconds)


def connected(port: int) -> socket.socket:
    """A connection to the sink, as soon as that listens."""
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.01)


def measured(sink: Sink, case: Case, connect: Callable[[], nbd.NBD], seconds: float) -> Result:
    """Rates without demand, then latencies of single reads under the same load."""
    reader = Reader(connect) if case.disk else None
    time.sleep(_SETTLE)
    before, began = (sink.moved, reader.moved if reader else 0), time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    ram, disk = sink.moved - before[0], (reader.moved if reader else 0) - before[1]
    handle, found = connect(), list[float]()
    while time.monotonic() < began + passed + seconds:
        start = time.perf_counter()
        handle.pread(_BLOCK, len(found) * 7 * _BLOCK % SIZE)
        found.append(time.perf_counter() - start)
        time.sleep(0.001)
    if reader is not None:
        reader.close()
    return Result(ram / passed, disk / passed, found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    given = parser.parse_args()
    ways = {"channel": through_channel, "plain": plain}
    found: dict[tuple[Case, str], list[Result]] = {}
    for _ in range(given.rounds):
        for case in CASES:
            for name, run in ways.items():
                with tempfile.TemporaryDirectory(prefix="channel-") as directory:
                    found.setdefault((case, name), []).append(run(Path(directory), case, given.seconds))
    for (case, name), results in found.items():
        ram, disk, p50, p99 = (
            statistics.median(values)
            for values in zip(*((each.ram, each.disk, each.p50, each.p99) for each in results), strict=True)
        )
        rates = f"RAM {ram / 1e6:6.0f} MB/s  disk {disk / 1e6:6.0f} MB/s"
        times = f"demand p50 {p50 * 1e3:6.2f} ms  p99 {p99 * 1e3:6.2f} ms"
        print(f"{f'{case.name}, {name}':22} {rates}  {times}", flush=True)
    both, two = ([each.ram + each.disk for each in found[CASES[0], name]] for name in ways)
    ratio = statistics.median(a / b for a, b in zip(both, two, strict=True))
    print(f"RAM and disk together: {ratio:.2f} of two TCP connections")


if __name__ == "__main__":
    main()
