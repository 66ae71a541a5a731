"""Images of any format that QEMU knows, through a ``qemu-nbd`` of our own on a private Unix socket.

The child serves one connection, ours, and ends when that ends, so that it never outlives this process; the
kernel kills it should this process die before it is connected. When it dies by itself it is started again,
unless that could pass over acknowledged writes: what it had not flushed yet died with it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdserve.backends.nbd import NbdBackend
from nbdserve.backends.offset import WHOLE, Slice
from nbdserve.client.pipeline import Client, connect
from nbdserve.client.upstream import PATIENCE, Fate, Upstream
from nbdserve.common.errors import ConnectError, ImageError, OperatorError
from nbdserve.common.socket_paths import place_for_sockets
from nbdserve.common.threads import LOOK, Thread
from nbdserve.common.uri import NbdUri

_LOG = logging.getLogger("nbdserve")

_START_TIMEOUT = 10.0
"""Seconds in which the child must be ready."""
_END_TIMEOUT = 30.0
"""Seconds in which the child ends by itself after its client has left, flushing what it holds."""
_LAST_WORDS = 1000
"""Bytes of what a child says that an error message repeats."""
_PREFIX = re.compile(r"qemu-nbd: (Failed to blk_new_open '.*?': )?")
"""What is already known of every line that it says."""


@dataclass(frozen=True)
class Manner:
    """How qemu-nbd opens an image, in the words of its own options; None leaves it to qemu-nbd."""

    format: str
    read_only: bool = False
    discard: str = "unmap"
    detect_zeroes: str | None = None
    cache: str | None = None
    aio: str | None = None

    def options(self) -> list[str]:
        """Return the words on qemu-nbd's command line."""
        named = {
            "format": self.format,
            "discard": self.discard,
            "detect-zeroes": self.detect_zeroes,
            "cache": self.cache,
            "aio": self.aio,
        }
        found = [f"--{name}={value}" for name, value in named.items() if value is not None]
        return [*found, "--read-only"] if self.read_only else found

    @property
    def durable(self) -> bool:
        """Tell whether nothing is acknowledged before it is durable."""
        return self.cache in ("writethrough", "directsync")


def open_qemu(path: Path, manner: Manner, *, part: Slice = WHOLE) -> QemuBackend:
    """Serve an image in one of QEMU's formats; ImageError, with qemu-nbd's own reason, when it cannot."""
    if shutil.which("qemu-nbd") is None:
        raise ImageError(f"{path}: to serve {manner.format} images takes qemu-nbd: install qemu-utils")
    child = Child(path, manner)
    try:
        upstream = Upstream(str(path), child.dial, patience=PATIENCE, fate=child.fate)
        return QemuBackend(upstream, child, read_only=manner.read_only, part=part)
    except BaseException:
        child.end()
        raise


class QemuBackend(NbdBackend):
    """An image that a child serves. The backend owns both."""

    def __init__(self, upstream: Upstream, child: Child, *, read_only: bool, part: Slice) -> None:
        super().__init__(upstream, read_only=read_only, part=part)
        self._child = child

    @property
    def last_patience(self) -> float | None:
        """Grant no less than the disk beneath needs."""
        return None

    def close(self) -> None:
        """Take leave of the child and wait for its end."""
        super().close()
        self._child.end()


class Child:
    """A ``qemu-nbd`` for one image, started whenever it is dialled."""

    def __init__(self, path: Path, manner: Manner) -> None:
        self._path = path
        self._manner = manner
        self._running: _Running | None = None

    def dial(self, timeout: float) -> Client:
        """Start a child and connect to it; ImageError when it ends instead, ConnectError when it is late."""
        self.end()
        # Nobody else can get at the socket, and nothing is left of it when this process is killed later.
        with tempfile.TemporaryDirectory(prefix="nbdserve-", dir=place_for_sockets()) as private:
            uri = NbdUri(socket=f"{private}/socket")
            self._running = running = _Running(self._path, self._command(f"{private}/socket"))
            deadline = time.monotonic() + max(timeout, _START_TIMEOUT)
            while True:
                try:
                    # Who does not ask for block sizes may ask for any range, and qemu-nbd makes it fit.
                    client = connect(
                        uri,
                        timeout=timeout,
                        # It waits for the same disk as we would; killing it would lose what it holds.
                        silence=math.inf,
                        contexts=None,
                        block_sizes=False,
                    )
                except ConnectError:
                    if running.ended.is_set():
                        raise ImageError(f"{self._path}: qemu-nbd: {running.last_words()}") from None
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(LOOK)
                else:
                    running.connected = True
                    return client

    def fate(self) -> Fate:
        """A child that ended in good order has flushed everything."""
        return Fate.SAFE if self.end() == 0 or self._manner.durable else Fate.LOST

    def end(self) -> int | None:
        """Return the exit code of the child, which has lost its client; it is killed when it does not end."""
        running, self._running = self._running, None
        return None if running is None else running.wait()

    def _command(self, socket: str) -> list[str]:
        common = ["qemu-nbd", f"--socket={socket}", "--shared=1", "--allocation-depth"]
        return [*common, *self._manner.options(), "--", str(self._path.absolute())]


class _Running:
    """One process, started and waited for by a thread of its own.

    The kernel's signal at a parent's death is sent when the *thread* that started the child ends.
    """

    def __init__(self, path: Path, command: Sequence[str]) -> None:
        self.ended = threading.Event()
        self.connected = False
        self._path = path
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed with this object
        self._started: queue.SimpleQueue[subprocess.Popen[bytes] | OSError] = queue.SimpleQueue()
        words = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        try:
            Thread(self._run, f"qemu-nbd {path}", words).start()
        except OSError as error:
            raise OperatorError(f"{path}: cannot start qemu-nbd: {error.strerror}") from error
        outcome = self._started.get()
        if isinstance(outcome, OSError):
            raise OperatorError(f"{path}: cannot start qemu-nbd: {outcome.strerror}") from outcome
        self._process = outcome

    def last_words(self) -> str:
        """Return what the child said at its end, in one line."""
        said = os.pread(self._log.fileno(), _LAST_WORDS, 0).decode(errors="replace")
        lines = [_PREFIX.sub("", line) for line in said.splitlines() if line.strip()]
        return ": ".join(lines) or "it ended without a word"

    def wait(self) -> int:
        """Return the exit code; the process is killed if it does not end soon."""
        waits = _END_TIMEOUT if self.connected else 0
        if not self.ended.wait(waits):
            if waits:
                _LOG.warning("%s: qemu-nbd does not end by itself: killed", self._path)
            # Where rights were dropped since it was started, only its own end will end it.
            with contextlib.suppress(PermissionError):
                self._process.kill()
            self.ended.wait(_END_TIMEOUT)
        code = self._process.returncode
        return -signal.SIGKILL if code is None else code

    def _run(self, command: list[str]) -> None:
        try:
            # A group of its own: the terminal's Ctrl-C is for this server, which then ends the child.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, process_group=0
            )
        except OSError as error:
            self._started.put(error)
            return
        self._started.put(process)
        code = process.wait()
        if code and self.connected:
            _LOG.warning("%s: qemu-nbd ended with %d: %s", self._path, code, self.last_words())
        self.ended.set()
