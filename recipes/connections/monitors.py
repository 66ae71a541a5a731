"""The way to a monitor, which may be one that only another host can see.

There a small program connects to it and passes its bytes on (bridge.py), over the connection to this host
that is shared by everything: nothing has to be forwarded, which sshd may forbid.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nbdserve.qmp.client import QueuedError, UnreachableError
from recipes.connections.address import host_and_port
from recipes.errors import MigrationError
from recipes.hosts.calls import cannot_start, unreachable
from recipes.hosts.host import Host
from recipes.hosts.interruption import completed
from recipes.hosts.messages import Beginning
from recipes.hosts.process_group import end_group
from recipes.hosts.spawn import spawn

END = 3.0
"""Seconds in which what leads to a monitor has ended once that is left."""


@dataclass(frozen=True)
class MonitorAt:
    """Where a monitor is: a socket's path or HOST:PORT, as its host sees it, or this machine without one."""

    address: str
    host: Host | None = None

    def __str__(self) -> str:
        return f"{self.address} on {self.host.name}" if self.host else self.address


def monitor_of(host: Host, address: str) -> MonitorAt:
    """Return where a host's monitor is: over there, unless the way to it is a prefix of commands only."""
    return MonitorAt(address, host if host.address else None)


@dataclass(frozen=True)
class Passage:
    """The way to a monitor: what its client connects to, and a process that leads there, if one does."""

    target: str | tuple[str, int] | socket.socket
    process: asyncio.subprocess.Process | None = None

    async def close(self) -> None:
        """See that what leads there has ended; call it when the client has left. Never fails."""
        if isinstance(self.target, socket.socket):
            self.target.close()
        if self.process:
            await completed(_ended(self.process))


async def passage(where: MonitorAt, name: str, limit: float) -> Passage:
    """Return a way to a monitor; ``name`` is what messages call who is there.

    Raises UnreachableError, where nobody is there, QueuedError, where nobody is let in within ``limit``
    seconds, and HostError, where there is no way to the host within them.
    """
    if where.host is None:
        return Passage(where.address if where.address.startswith("/") else host_and_port(where.address))
    return await through(where.host, where.host.own("bridge", where.address), name, limit)


async def through(
    host: Host, command: Sequence[str], name: str, limit: float, lacking: str = "no monitor"
) -> Passage:
    """Return a way to whom a command on a host leads, whose first message is that of bridge.py.

    ``lacking`` is what messages say where that leads nowhere. Raises as ``passage`` does.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    try:
        with theirs, tempfile.TemporaryFile() as errors:
            beginning = Beginning(host, command)
            process = await _started(host, beginning, theirs.fileno(), errors.fileno())
            theirs.close()
            try:
                said = await _first_message(beginning, ours, limit)
                if "connected" not in said:
                    raise await _failure(host, beginning, process, said, (name, lacking), errors.fileno())
            except BaseException:
                ours.close()
                await completed(_ended(process))
                raise
    except BaseException:
        ours.close()
        raise
    return Passage(ours, process)


async def _started(host: Host, beginning: Beginning, fd: int, errors: int) -> asyncio.subprocess.Process:
    try:
        return await spawn(beginning.argv(), stdin=fd, stdout=fd, stderr=errors, start_new_session=True)
    except OSError as error:
        raise cannot_start(host, f"the way to a monitor on {host.name}", error) from error


async def _first_message(beginning: Beginning, ours: socket.socket, limit: float) -> dict[str, Any]:
    with suppress(TimeoutError, OSError):
        async with asyncio.timeout(limit):
            return await beginning.first(_Greedless(ours)) or {"ended": True}
    return {}


async def _failure(
    host: Host,
    beginning: Beginning,
    process: asyncio.subprocess.Process,
    said: dict[str, Any],
    names: tuple[str, str],
    errors: int,
) -> MigrationError | QueuedError | UnreachableError:
    """Return why there is no way to a monitor: nobody is there, or the host cannot be reached."""
    name, lacking = names
    if "failed" in said:
        reason = str(said["failed"])
        return UnreachableError(
            f"{name}: {lacking}: {reason}", reason, nobody_listens=bool(said.get("nobody"))
        )
    if beginning.arrived and not said:
        return QueuedError(f"{name} lets nobody in")
    told = os.pread(errors, 1 << 16, 0).decode(errors="replace")
    why = await beginning.failure(process, told)
    return MigrationError(f"{name}: {why}") if beginning.arrived else unreachable(host, "", why)


class _Greedless:
    """Lines of a socket, of which nothing behind the last one is read: that is the monitor's."""

    def __init__(self, source: socket.socket) -> None:
        self._source = source

    async def readline(self) -> bytes:
        line = bytearray()
        loop = asyncio.get_running_loop()
        while not line.endswith(b"\n"):
            byte = await loop.sock_recv(self._source, 1)
            if not byte:
                break
            line += byte
        return bytes(line)


async def _ended(process: asyncio.subprocess.Process) -> None:
    """Wait a moment until a process has ended, and then end it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(END):
            await process.wait()
    await end_group(process)
