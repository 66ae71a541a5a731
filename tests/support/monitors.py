"""A monitor's client, of the library qemu.qmp, in which every call has a time limit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError
from qemu.qmp.legacy import QEMUMonitorProtocol

SECONDS = 60.0


class Qmp:
    """A connected client. Commands that are refused raise qemu.qmp's ExecuteError."""

    def __init__(self, protocol: QEMUMonitorProtocol) -> None:
        self._protocol = protocol

    def execute(self, command: str, **arguments: object) -> Any:
        """What the command returns; ``node_name`` stands for ``node-name``, ``type_`` for ``type``."""
        named = {name.rstrip("_").replace("_", "-"): value for name, value in arguments.items()}
        return self._protocol.cmd(command, **named)

    def event(self) -> dict[str, Any]:
        """The next event; TimeoutError when there is none in time."""
        event = self._protocol.pull_event(wait=SECONDS)
        assert event is not None
        return event


def _connected(path: Path) -> QEMUMonitorProtocol:
    """Between the moments in which QEMU binds the socket and listens on it, it refuses."""
    deadline = time.monotonic() + SECONDS
    while True:
        protocol = QEMUMonitorProtocol(str(path))
        protocol.settimeout(SECONDS)
        try:
            protocol.connect()
            return protocol
        except ConnectError as error:
            if not isinstance(error.exc, ConnectionRefusedError) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def monitor(path: Path) -> Iterator[Qmp]:
    """Connect to the monitor at a Unix socket until the block ends."""
    protocol = _connected(path)
    try:
        yield Qmp(protocol)
    finally:
        try:
            protocol.close()
        except (EOFError, ConnectionError):
            # The server was told to quit.
            pass
