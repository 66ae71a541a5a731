"""The single channel in tests: a destination in the test's process, sources as QEMU starts them, a road."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from nbdserve.channel import places
from nbdserve.channel.destination import Destination, Event, Limits, Settings, Status
from nbdserve.client.libnbd import nbd
from nbdserve.connection.listeners import Listener
from tests.support.processes import PATIENCE, Argument, dying_with_parent, is_alive, wait_until
from tests.support.servers import fresh_path

NBDSERVE = Path(sys.executable).with_name("nbdserve")
LOADED = b"\0\1\0\4\0\0\0\0"
"""What QEMU says on the return path when it has loaded everything."""
SIZE = 4 << 20
_WAIT = 10.0 * PATIENCE


class Road:
    """A way for TCP connections, which can be cut, blocked, or let nobody through."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.open = threading.Event()
        self.open.set()
        self._deaf = set[socket.socket]()
        self.passed = 0
        """Connections that were begun."""
        self.is_closed = False
        self._pairs: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def cut(self) -> None:
        """End every connection."""
        for each in self._pairs:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def deafen(self) -> None:
        """From now on nothing goes on of what the clients say that there are, nor that they hang up."""
        self._deaf |= set(self._pairs[::2])

    def close(self) -> None:
        """End everything."""
        self.open.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.is_closed:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._target))
                self.passed += 1
                self._pairs += [client, server]
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.open.wait()
                if source not in self._deaf:
                    target.sendall(data)
        if source in self._deaf:
            return
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def receive(sock: socket.socket, length: int) -> bytes:
    """Exactly so many bytes."""
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        assert piece
        data += piece
    return data


class Sender:
    """``nbdserve channel`` as QEMU starts it, and this test in QEMU's place."""

    def __init__(self, argv: Sequence[Argument], directory: Path, inherited: Sequence[int] = ()) -> None:
        self.log = fresh_path(directory, "channel", ".log")
        self._errors = fresh_path(directory, "errors", ".log")
        self._pid_file = fresh_path(directory, "channel", ".pid")
        own: list[Argument] = ["--log", self.log, "--pid-file", self._pid_file]
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*dying_with_parent(signal.SIGKILL), NBDSERVE, "channel", *argv, *own],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=inherited,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stream = self.process.stdin.fileno()
        self.answers = self.process.stdout.fileno()

    @property
    def errors(self) -> str:
        """What the operator, or QEMU's log, is told."""
        return self._errors.read_text()

    @property
    def worker(self) -> int:
        """The process id of what is left behind."""
        wait_until(lambda: self._pid_text() != "", "the worker's pid file")
        return int(self._pid_text())

    def _pid_text(self) -> str:
        """What is in the pid file, which the worker removes at its end; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return self._pid_file.read_text().strip()
        return ""

    def write(self, data: bytes) -> None:
        """Send as QEMU does, as fast as that is taken."""
        view = memoryview(data)
        while view:
            assert select.select([], [self.stream], [], _WAIT)[1], "nobody takes the stream"
            view = view[os.write(self.stream, view[:65536]) :]

    def read(self, length: int) -> bytes:
        """Receive from the return path, up to its end."""
        data = b""
        while len(data) < length:
            assert select.select([self.answers], [], [], _WAIT)[0], f"no answer behind {data!r}"
            piece = os.read(self.answers, length - len(data))
            if not piece:
                break
            data += piece
        return data

    def end(self) -> int:
        """Close the stream and wait, as QEMU does; the exit code."""
        self.hang_up()
        return self.wait()

    def hang_up(self) -> None:
        """Close the stream."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def wait(self) -> int:
        """The exit code of the process that QEMU waits for."""
        return self.process.wait(_WAIT)

    def close(self) -> None:
        """Leave nothing behind."""
        self.hang_up()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(_WAIT)
        if (text := self._pid_text()) and is_alive(int(text)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(text), 9)
            wait_until(lambda: not is_alive(int(text)), "the worker's end")


class Scene:
    """A destination, where its QEMU would wait, a disk at the source, and the token of both."""

    def __init__(
        self,
        directory: Path,
        *,
        tls: Path | None = None,
        limits: Limits | None = None,
        unix: bool = False,
        arrived: bool = False,
        listens_for_qemu: bool = True,
    ) -> None:
        self.directory = directory
        self.token = directory / "token"
        self.token.touch(mode=0o600)
        self.token.write_text("0123456789abcdef" * 4)
        self.disk = directory / "disk"
        self.content = os.urandom(SIZE)
        self.disk.write_bytes(self.content)
        self.path = directory / "channel.sock"
        self.events: list[Event] = []
        self.reasons: list[str] = []
        self.limits = limits or Limits()
        self._tls = tls
        self._unix = unix
        self.incoming = directory / "incoming"
        self._incoming = socket.socket(socket.AF_UNIX)
        if listens_for_qemu:
            self._incoming.bind(str(self.incoming))
            self._incoming.listen()
            self._incoming.settimeout(_WAIT)
        self._stack = contextlib.ExitStack()
        self.port = 0
        self.destination = self.begin(arrived=arrived)
        self.road = None if unix else Road(self.port)

    def begin(self, *, arrived: bool) -> Destination:
        """Make a destination; again, after the former was closed."""
        context = None if self._tls is None else places.server_context(self._tls)
        place = f"unix:{self.path}" if self._unix else f"127.0.0.1:{self.port}"
        listeners: list[Listener] = places.listen(place, encrypted=context is not None)
        if not self._unix:
            self.port = int(listeners[0].sock.getsockname()[1])
        self.destination = Destination(
            listeners,
            Settings(
                places.read_token(self.token),
                str(self.incoming),
                context,
                arrived=arrived,
                limits=self.limits,
            ),
            self._tell,
        )
        self.destination.start()
        return self.destination

    def options(self, *more: Argument) -> list[Argument]:
        """The options that lead here, by the road."""
        place = f"unix:{self.path}" if self.road is None else f"127.0.0.1:{self.road.port}"
        return ["--connect", place, "--export", f"disk={self.disk}", "--token-file", self.token, *more]

    def send(self, *more: Argument) -> Sender:
        """Start the source's end, with these options."""
        return self.send_with(self.options(*more))

    def send_with(self, options: Sequence[Argument]) -> Sender:
        """Start the source's end with these options only."""
        sender = Sender(options, self.directory)
        self._stack.callback(sender.close)
        return sender

    def arrive(self) -> socket.socket:
        """Be the QEMU at the destination: what has come to its socket."""
        qemu, _ = self._incoming.accept()
        qemu.settimeout(_WAIT)
        self._stack.callback(qemu.close)
        return qemu

    def migrate(self, *more: Argument) -> Sender:
        """Send RAM to its end, so that only disks are left to be served."""
        return self.migrate_with(self.options(*more))

    def migrate_with(self, options: Sequence[Argument]) -> Sender:
        """The same, with these options only."""
        sender = self.send_with(options)
        qemu = self.arrive()
        sender.write(b"RAM")
        assert qemu.recv(3) == b"RAM"
        qemu.sendall(LOADED)
        assert sender.read(len(LOADED)) == LOADED
        assert sender.end() == 0
        qemu.close()
        return sender

    def client(self, export: str = "disk") -> nbd.NBD:
        """A client of the disk, through the channel."""
        handle = nbd.NBD()
        handle.set_export_name(export)
        handle.connect_socket(self.destination.open().detach())
        return handle

    def read_disk(self) -> bool:
        """Whether the whole disk is read as it is."""
        handle = self.client()
        read = b"".join(bytes(handle.pread(1 << 20, at)) for at in range(0, SIZE, 1 << 20))
        handle.shutdown()
        return read == self.content

    def wait_for(self, event: Event, count: int = 1) -> None:
        """Wait until something was told so often."""
        wait_until(lambda: self.events.count(event) >= count, f"{event} in {self.events}")

    @property
    def status(self) -> Status:
        """How the channel is doing."""
        return self.destination.status()

    def close(self) -> None:
        """End everything."""
        self._stack.close()
        self.destination.close()
        if self.road is not None:
            self.road.close()
        self._incoming.close()

    def _tell(self, event: Event, reason: str) -> None:
        self.events.append(event)
        self.reasons.append(reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def resumed(scene: Scene, *more: Argument) -> Iterator[subprocess.Popen[str]]:
    """``nbdserve channel --resume``, as an operator starts it."""
    process = subprocess.Popen(
        [*dying_with_parent(signal.SIGKILL), NBDSERVE, "channel", *scene.options("--resume", *more)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=_WAIT)
