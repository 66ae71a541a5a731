"""The guest: a Linux in which Python runs the workload, and what it tells the host of each request.

Its clock stands still while it stands still itself: so a request's latency, which the guest measures, has
nothing of the downtime, and the host's clock says when the guest told of it.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from recipes.demo import initramfs, kernel
from tests.support.appliance import archive_of, with_libraries

HERE = Path(__file__).parent
MEMORY = 192
"""MiB of RAM that it has."""

MODULES = (*initramfs.MODULES, "virtio_console")
"""Of its kernel."""

NODE = "disk0"
"""The block node that its disk refers to."""

_LOADED = """
import sys
sys.path.append(sys.argv[1])
import workload
del sys.modules["workload"]
print(*(module.__file__ for module in sys.modules.values() if getattr(module, "__file__", None)))
"""
"""Tells which files the workload needs of the standard library."""


class GuestError(RuntimeError):
    """The guest has failed, or what it tells has a gap."""


@dataclass(frozen=True)
class Done:
    """A request that the guest has told of.

    at       when the host heard of it (time.monotonic)
    host     "a" or "b": where the guest was
    kind     "w" or "r"
    seconds  how long it took, by the guest's clock
    """

    at: float
    host: str
    kind: str
    seconds: float


class Listener:
    """Hears what the guest tells, on both hosts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: list[Done] = []
        self._last = {"w": 0, "r": 0}
        self._wrong = ""

    @property
    def done(self) -> list[Done]:
        """All that was told so far; GuestError when a request has failed, or was not told of."""
        with self._lock:
            if self._wrong:
                raise GuestError(self._wrong)
            return list(self._done)

    def first_on(self, host: str) -> float | None:
        """When the guest had its first request answered on a host, or None."""
        return next((each.at for each in self.done if each.host == host), None)

    def hear(self, host: str, line: str, at: float) -> None:
        """Note a line."""
        with self._lock:
            try:
                kind, number, microseconds = line.split()
                if int(number) != self._last[kind] + 1:
                    raise GuestError(f"after {kind} {self._last[kind]} the guest told of {number}")
                self._last[kind] = int(number)
                self._done.append(Done(at, host, kind, int(microseconds) / 1e6))
            except (ValueError, KeyError, GuestError) as error:
                self._wrong = self._wrong or f"the guest on {host} says {line!r}: {error}"

    def listen(self, listeners: Mapping[str, socket.socket], end: socket.socket) -> None:
        """Hear both QEMUs, until ``end`` is written to.

        In one thread, and A first: what was told there was told before, even if both are heard at once.
        """
        rest = b""
        with ExitStack() as stack, selectors.DefaultSelector() as selector:
            for host, listener in listeners.items():
                selector.register(listener, selectors.EVENT_READ, host)
            selector.register(end, selectors.EVENT_READ, "end")
            while True:
                ready = [(str(key.data), key.fileobj) for key, _ in selector.select()]
                at = time.monotonic()
                for host, each in sorted(ready, key=lambda found: found[0]):
                    assert isinstance(each, socket.socket)
                    if host == "end":
                        return
                    if each is listeners[host]:
                        port = stack.enter_context(each.accept()[0])
                        selector.register(port, selectors.EVENT_READ, host)
                        continue
                    data = each.recv(1 << 16)
                    if not data:
                        selector.unregister(each)
                    # A line may have begun on A, and end on B.
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        self.hear(host, line.decode(errors="replace"), at)


@dataclass(frozen=True)
class Guest:
    """What it is started with.

    rate     writes, and as many reads, that it does in a second
    sockets  directory of the sockets at which its ports are listened to
    """

    kernel: Path
    initramfs: Path
    rate: float
    sockets: Path = Path()

    def port(self, host: str) -> Path:
        """Return the socket that QEMU on a host connects to."""
        return self.sockets / f"{host}.port"

    def qemu(self, host: str) -> tuple[str, ...]:
        """Return QEMU's command line, without its disk's block node and its monitor."""
        told = f"quiet panic=-1 mitigations=off no_timer_check python={_python()} rate={self.rate:g}"
        return (
            *("qemu-system-x86_64", "-accel", "tcg", "-machine", "pc", "-m", str(MEMORY), "-smp", "1"),
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-kernel", str(self.kernel), "-initrd", str(self.initramfs)),
            *("-append", f"console=ttyS0 {told}", "-serial", f"file:{self.sockets / host}.console"),
            *("-chardev", f"socket,id=port,path={self.port(host)}"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port"),
            *("-device", f"virtio-blk-pci,drive={NODE},rerror=stop,werror=stop"),
        )

    @contextmanager
    def heard(self) -> Iterator[Listener]:
        """Listen to it on both hosts."""
        heard, listeners = Listener(), {}
        with ExitStack() as stack:
            for host in ("a", "b"):
                listeners[host] = stack.enter_context(socket.socket(socket.AF_UNIX))
                listeners[host].bind(str(self.port(host)))
                listeners[host].listen(1)
            ours, its = map(stack.enter_context, socket.socketpair())
            thread = threading.Thread(target=heard.listen, args=(listeners, its))
            thread.start()
            stack.callback(thread.join)
            stack.callback(ours.send, b"end")
            yield heard


def _python() -> str:
    return os.path.realpath(sys.executable)


def build(directory: Path, rate: float) -> Guest:
    """Make what it boots from, in a directory."""
    linux = kernel.fetch()
    guest = Guest(linux.image, directory / "initramfs", rate)
    initramfs.build(guest.initramfs, linux, modules=MODULES, init=HERE / "init")
    words = [_python(), "-I", "-S", "-B", "-c", _LOADED, str(HERE)]
    loaded = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    libraries = with_libraries([_python(), *(each for each in loaded if each.endswith(".so"))])
    with guest.initramfs.open("ab") as archive:
        archive.write(archive_of([*libraries, *(each for each in loaded if each.endswith(".py"))]))
        archive.write(archive_of(["workload.py"], HERE))
    return guest
