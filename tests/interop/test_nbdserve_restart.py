"""A server that is stopped and started again: QEMU's client reconnects, and its guest notices nothing."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.disks import MIB, random_disk
from tests.support.processes import Process, dying_with_parent, wait_until
from tests.support.servers import Server, UnixAddress, nbdserve


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A raw image of 1 MiB."""
    path = tmp_path / "disk.img"
    random_disk(path, MIB)
    return path


class QemuIo:
    """A qemu-io that stays connected and is given one command after the other."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log

    def send(self, command: str) -> None:
        """Let it start a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def quit(self) -> None:
        """Let it say goodbye to the server."""
        self._process.communicate("quit\n", timeout=120)

    def output(self) -> str:
        """What it has written so far."""
        return self._log.read_text()

    def await_output(self, text: str, times: int = 1) -> None:
        """Wait until it has written the text so often."""
        wait_until(lambda: self.output().count(text) >= times, f"{text!r} in {self.output()!r}", seconds=20)


@contextmanager
def qemu_io(server: Server, directory: Path) -> Iterator[QemuIo]:
    """One that is connected to the server, and comes back to it."""
    assert isinstance(server.address, UnixAddress)
    command = [*dying_with_parent(signal.SIGKILL), "qemu-io", "--image-opts", _node(server.address)]
    log = directory / "qemu-io.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, text=True)
    try:
        yield QemuIo(process, log)
    finally:
        process.kill()
        process.wait()


def test_an_idle_qemu_that_lost_its_server_goes_on_when_it_is_back(image: Path, tmp_path: Path) -> None:
    at = UnixAddress(tmp_path / "nbd.sock")
    with nbdserve("-f", "raw", image, directory=tmp_path, at=at) as first, qemu_io(first, tmp_path) as qemu:
        qemu.send("write -P 7 0 64k")
        qemu.await_output("wrote 65536/65536")
        # Whatever it is told now it would take for the answer to its next request.
        assert first.process.terminate() == 0
        qemu.send("write -P 8 64k 64k")
        with nbdserve("-f", "raw", image, directory=tmp_path, at=at):
            qemu.await_output("wrote 65536/65536", times=2)
            qemu.send("read -P 7 0 64k")
            qemu.await_output("read 65536/65536")
            qemu.quit()
        assert "failed" not in qemu.output(), "neither a request nor the comparison with the pattern"
    assert image.read_bytes()[: 128 << 10] == b"\7" * (64 << 10) + b"\10" * (64 << 10)


def test_a_busy_qemu_loses_nothing_when_its_server_is_restarted(tmp_path: Path) -> None:
    at, image = UnixAddress(tmp_path / "nbd.sock"), tmp_path / "disk.img"
    size, requests = 16 * MIB, 60_000
    image.write_bytes(bytes(size))
    work = ["bench", "-w", "--pattern=7", "-d", "16", "-s", "4k", "-c", str(requests), "-t", "none"]
    command = ["qemu-img", *work, "--image-opts", _node(at)]
    with ExitStack() as stack:
        server = stack.enter_context(nbdserve("-f", "raw", image, directory=tmp_path, at=at))
        client = stack.enter_context(Process(command, tmp_path / "qemu-img.log"))
        for _ in range(3):
            client.wait_for(partial(_has_written, server.pid, 2 * MIB), "it writes")
            assert client.running, "the work was done before the server was restarted"
            assert server.process.terminate() == 0
            server = stack.enter_context(nbdserve("-f", "raw", image, directory=tmp_path, at=at))
        assert client.wait(60) == 0, client.output()
        assert "Run completed" in client.output()
    assert image.read_bytes() == b"\7" * size


def _node(address: UnixAddress) -> str:
    """A QEMU node that connects again for 20 seconds when it loses the server."""
    return f"driver=nbd,server.type=unix,server.path={address.path},reconnect-delay=20"


def _has_written(pid: int, size: int) -> bool:
    """Whether a process has written so many bytes to files and sockets."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"]) >= size
