"""Block jobs over QMP, of QEMU's storage daemon and of nbd-overlay, as their clients see them."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.processes import Process, listens

Message = dict[str, Any]


class Talk:
    """One client of a monitor that keeps all that it hears, in order, without the time stamps."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60.0)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r")
        self.heard: list[Message] = []
        self._next()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> Message:
        """The reply to a command, an error too; ``job_id`` stands for ``job-id``."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": given}).encode())
        while True:
            message = self._next()
            if "event" not in message:
                return message

    def listen_until(self, event: str, **data: object) -> None:
        """Hear events until one comes that has these data, if it was not heard before."""
        wanted = {"event": event, "data": data}
        while not any(_matches(message, wanted) for message in self.heard):
            self._next()

    def take_events(self) -> list[Message]:
        """The events heard since the last call."""
        events = [message for message in self.heard if "event" in message]
        self.heard.clear()
        return events

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()

    def _next(self) -> Message:
        message: Message = json.loads(self._lines.readline())
        message.pop("timestamp", None)
        self.heard.append(message)
        return message


def _matches(message: Message, wanted: Message) -> bool:
    data = message.get("data", {})
    return bool(message.get("event") == wanted["event"] and wanted["data"].items() <= data.items())


@contextmanager
def talk(path: Path) -> Iterator[Talk]:
    """A client of the monitor at a Unix socket, until the block ends."""
    found = Talk(path)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def storage_daemon(directory: Path, *blockdevs: str) -> Iterator[Path]:
    """QEMU's storage daemon with these block devices; the path of its monitor."""
    path = directory / "storage.qmp"
    argv = ["qemu-storage-daemon", "--chardev", f"socket,path={path},server=on,wait=off,id=monitor"]
    argv += ["--monitor", "chardev=monitor"]
    for blockdev in blockdevs:
        argv += ["--blockdev", blockdev]
    with Process(argv, directory / "storage-daemon.log") as process:
        process.wait_for(lambda: listens(path), "the monitor's socket")
        yield path
