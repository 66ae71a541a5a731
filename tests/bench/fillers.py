"""What fills a local disk from an NBD server: our daemon, QEMU's block-stream, and nbdcopy as a yardstick."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.support.disks import MIB
from tests.support.processes import Process, check, listens
from tests.support.servers import NBDSERVE, UnixAddress, fresh_path

NBD_OVERLAY = NBDSERVE.with_name("nbd-overlay")
LIMIT = 600.0
"""Seconds that filling may take."""


class Filler:
    """A disk that is being served while it is, or can be, filled."""

    def __init__(self, process: Process, address: UnixAddress, monitor: Path, device: str) -> None:
        self.process = process
        self.address = address
        self._device = device
        self._monitor = QEMUMonitorProtocol(str(monitor))
        self._monitor.settimeout(LIMIT)
        self._monitor.connect()

    def start(self) -> None:
        """Begin to stream."""
        self._monitor.cmd("block-stream", **{"job-id": "stream", "device": self._device})

    def wait(self) -> None:
        """Return when everything is local."""
        while (event := self._monitor.pull_event(wait=LIMIT)) is not None:
            if event["event"] == "BLOCK_JOB_COMPLETED":
                assert "error" not in str(event["data"]), event
                return

    def fill(self) -> float:
        """Stream everything; the seconds that it took."""
        began = time.monotonic()
        self.start()
        self.wait()
        return time.monotonic() - began

    def close(self) -> None:
        """Let go of the monitor."""
        with contextlib.suppress(EOFError, OSError):
            self._monitor.close()


def touch_memory(directory: Path, size: int) -> None:
    """Touch as much memory as is about to be filled, in bytes.

    A virtual machine's host may have taken back what is free: then it comes back page by page, at a quarter
    of the speed, for whoever happens to be next.
    """
    path = fresh_path(directory, "touched", ".img")
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(bytes(MIB))
    path.unlink()


Start = Callable[[UnixAddress, int, Path], AbstractContextManager[Filler]]


@dataclass(frozen=True)
class Contender:
    """Something that fills; ``start(source, size, directory)`` prepares an empty image of ``size`` bytes."""

    name: str
    start: Start


@contextlib.contextmanager
def _running(
    argv: list[str | Path], at: UnixAddress, monitor: Path, device: str, log: Path
) -> Iterator[Filler]:
    with Process(argv, log) as process:
        process.wait_for(lambda: listens(at.path) and listens(monitor), "its sockets")
        filler = Filler(process, at, monitor, device)
        try:
            yield filler
        finally:
            filler.close()
            process.terminate(30)


def overlay(layout: str, program: Sequence[str] = (str(NBD_OVERLAY),)) -> Start:
    """Our daemon, on an image of this layout; ``program`` are the words that start it."""

    @contextlib.contextmanager
    def start(source: UnixAddress, size: int, directory: Path) -> Iterator[Filler]:
        image = fresh_path(directory, "overlay", ".img")
        at, monitor = (
            UnixAddress(fresh_path(directory, "overlay", ".sock")),
            fresh_path(directory, "overlay", ".qmp"),
        )
        check(
            *program,
            "create",
            "--layout",
            layout,
            "--size",
            str(size),
            "--backing",
            source.uri(),
            str(image),
        )
        argv: list[str | Path] = [*program, "serve", image, "-k", at.path, "--qmp", f"unix:{monitor}"]
        try:
            with _running(argv, at, monitor, "disk", fresh_path(directory, "overlay", ".log")) as filler:
                yield filler
        finally:
            for path in (image, Path(f"{image}.map")):
                path.unlink(missing_ok=True)

    return start


def qemu(layout: str) -> Start:
    """QEMU's storage daemon: an image of this format, copy-on-read, and block-stream."""

    @contextlib.contextmanager
    def start(source: UnixAddress, size: int, directory: Path) -> Iterator[Filler]:
        image = fresh_path(directory, "qemu", ".img")
        at, monitor = (
            UnixAddress(fresh_path(directory, "qemu", ".sock")),
            fresh_path(directory, "qemu", ".qmp"),
        )
        backing = unquote(source.uri())
        check(
            "qemu-img", "create", "-q", "-f", layout, "-u", "-F", "raw", "-b", backing, str(image), str(size)
        )
        argv: list[str | Path] = ["qemu-storage-daemon"]
        argv += ["--blockdev", f"nbd,node-name=far,read-only=on,server.type=unix,server.path={source.path}"]
        argv += ["--blockdev", "raw,node-name=backing,read-only=on,file=far"]
        argv += ["--blockdev", f"file,node-name=file,filename={image}"]
        argv += ["--blockdev", f"{layout},node-name=image,file=file,backing=backing"]
        argv += ["--blockdev", "copy-on-read,node-name=disk,file=image"]
        argv += ["--nbd-server", f"addr.type=unix,addr.path={at.path}"]
        argv += ["--export", "nbd,id=export,node-name=disk,name=,writable=on"]
        argv += ["--chardev", f"socket,id=monitor,path={monitor},server=on,wait=off"]
        argv += ["--monitor", "chardev=monitor"]
        try:
            with _running(argv, at, monitor, "image", fresh_path(directory, "qemu", ".log")) as filler:
                yield filler
        finally:
            image.unlink(missing_ok=True)

    return start


def nbdcopy(source: UnixAddress, directory: Path) -> float:
    """Copy everything into a file with libnbd's own tool, durably; the seconds that it took."""
    target = fresh_path(directory, "copy", ".img")
    began = time.monotonic()
    check("nbdcopy", "--flush", source.uri(), str(target), seconds=LIMIT)
    took = time.monotonic() - began
    target.unlink()
    return took


FLAT = Contender("nbd-overlay, flat", overlay("flat"))
QED = Contender("nbd-overlay, qed", overlay("qed"))
QEMU_QED = Contender("QEMU, qed", qemu("qed"))
QEMU_QCOW2 = Contender("QEMU, qcow2", qemu("qcow2"))
