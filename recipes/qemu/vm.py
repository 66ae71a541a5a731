"""One QEMU as its monitor shows it. Every wait has a time limit and ends when that QEMU does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from nbdserve.common.clock import now
from nbdserve.common.errors import ConnectError
from nbdserve.qmp import client as qmp
from nbdserve.qmp.client import EventListener, MonitorClient
from recipes.connections.monitors import MonitorAt, Passage, passage
from recipes.errors import MigrationError

AGAIN = 0.1
"""Seconds between two attempts to connect again."""


class VmGoneError(MigrationError):
    """A QEMU has ended, or its monitor hung up."""


class VmSilentError(MigrationError):
    """A QEMU did not answer, or what was waited for did not happen, within the limit."""


class RefusedGuestError(MigrationError):
    """A source's QEMU says that its migration has failed; why, the destination's says, if it still can."""


class CommandError(MigrationError):
    """A QEMU refused a command; ``reason`` is what it said."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Vm:
    """A connection to a QEMU's monitor, made by connect()."""

    def __init__(
        self,
        client: MonitorClient,
        limit: float,
        ends: EventListener | None = None,
        way: Passage | None = None,
    ) -> None:
        """``limit`` is that of each command, in seconds; ``ends`` has heard SHUTDOWN from the beginning.

        ``way`` is what leads to the monitor.
        """
        self.name = client.name
        self._client = client
        self._limit = limit
        self._ends = ends
        self._way = way

    async def execute(self, command: str, *, limit: float | None = None, **arguments: object) -> Any:
        """Execute a QMP command and return its value, as call() does; ``_`` in a keyword stands for ``-``."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        return await self.call(command, given, limit=limit)

    async def call(self, command: str, given: Mapping[str, object], *, limit: float | None = None) -> Any:
        """Execute a QMP command with these arguments and return its value.

        Waits ``limit`` seconds, or else the limit given to connect(). Raises CommandError when QEMU refuses,
        VmGoneError when it ends, VmSilentError when it does not answer.
        """
        with self._as_migration_errors():
            return await self._client.execute(command, given, limit=self._limit if limit is None else limit)

    def events(self, *names: str) -> AbstractContextManager[EventListener]:
        """Listen for events of these names. Do so before the command that causes them."""
        return self._client.events(*names)

    async def next_event(self, listener: EventListener, limit: float, what: str) -> dict[str, Any]:
        """Wait for the next event: its name as ``event``, and its data.

        Raises VmGoneError, or VmSilentError with ``what`` did not happen.
        """
        with self._as_migration_errors():
            return await self._client.next_event(listener, limit=limit, what=what)

    @property
    def shut_down(self) -> str | None:
        """Return why this QEMU has ended, or is about to, in good order (QEMU's ShutdownCause); or None."""
        history = self._ends.history if self._ends else ()
        if not history:
            return None
        data: dict[str, Any] = dict(history[-1].get("data") or {})  # type: ignore[call-overload]
        return str(data.get("reason", "unknown"))

    @property
    def connected(self) -> bool:
        """Tell whether the monitor is still there."""
        return self._client.connected

    async def gone(self) -> None:
        """Wait until the monitor has hung up, which it does when its QEMU ends."""
        await self._client.gone()

    async def ended(self) -> str:
        """Wait for the same, and return what it means."""
        await self.gone()
        return self.end

    @property
    def end(self) -> str:
        """Return in words what it means that the monitor has hung up."""
        if self._way and self._way.process:
            return "has ended, or the connection to its host is lost"
        return "has ended"

    @contextmanager
    def _as_migration_errors(self) -> Iterator[None]:
        """Turn what the monitor's client raises into failures of a migration."""
        try:
            yield
        except qmp.RefusedError as error:
            raise CommandError(str(error), error.reason) from error
        except qmp.GoneError as error:
            raise VmGoneError(f"{self.name} {self.end}") from error
        except qmp.MonitorError as error:
            # It may be there, whatever it says.
            raise VmSilentError(str(error)) from error

    async def disconnect(self) -> None:
        """Leave the monitor to others. Never fails."""
        await self._client.close(limit=self._limit)
        if self._way:
            await self._way.close()


class EndedVm(Vm):
    """A QEMU that had ended before anybody connected to its monitor."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._ends = self._way = None

    async def call(self, command: str, given: Mapping[str, object], *, limit: float | None = None) -> Any:
        """Raise VmGoneError."""
        raise VmGoneError(f"{self.name} has ended")

    @property
    def connected(self) -> bool:
        """It is not."""
        return False

    async def gone(self) -> None:
        """Return at once."""

    async def disconnect(self) -> None:
        """Do nothing."""


async def connect(name: str, where: MonitorAt | str, *, limit: float, command_limit: float) -> Vm:
    """Connect to a monitor, or to the one at this address on this machine.

    Raises ConnectError, one line, when nobody answers there within ``limit`` seconds. ``command_limit`` is
    the limit of each command, in seconds.
    """
    # From the beginning, so that no end is missed.
    ends = EventListener("SHUTDOWN")
    way: Passage | None = None
    try:
        way = await passage(MonitorAt(where) if isinstance(where, str) else where, name, limit)
        client = await qmp.connect(way.target, name=name, limit=limit, listeners=[ends])
    except BaseException as error:
        if way:
            await way.close()
        if isinstance(error, qmp.QueuedError):
            raise ConnectError(
                f"{name}: its monitor at {where} lets nobody in within {limit:g} s, as others wait for it "
                "already; end them, and who is connected to it"
            ) from error
        if isinstance(error, qmp.SilentError):
            raise ConnectError(
                f"{name}: its monitor at {where} accepts but does not answer within {limit:g} s; "
                "is another client connected to it?"
            ) from error
        if isinstance(error, qmp.UnreachableError):
            raise ConnectError(f"{name}: no monitor at {where}: {error.reason}") from error
        if isinstance(error, MigrationError):
            told = str(error)
            raise ConnectError(told if told.startswith(name) else f"{name}: {told}") from error
        raise
    return Vm(client, command_limit, ends, way)


def nobody_listens(error: ConnectError) -> bool:
    """Tell whether connect() has failed as there is no QEMU. One that is silent, or away, may be there."""
    return isinstance(error.__cause__, qmp.UnreachableError) and error.__cause__.nobody_listens


def is_somebody(error: ConnectError) -> bool:
    """Tell whether connect() has failed at somebody who is there, and says nothing."""
    return isinstance(error.__cause__, qmp.SilentError)


async def connect_again(
    name: str, where: MonitorAt | str, *, limit: float, command_limit: float
) -> Vm | None:
    """Connect to a monitor that has hung up; None when its QEMU has ended.

    Raises ConnectError when nobody knows after ``limit`` seconds.
    """
    deadline = now() + limit
    while True:
        try:
            return await connect(name, where, limit=limit, command_limit=command_limit)
        except ConnectError as error:
            if nobody_listens(error):
                return None
            if now() > deadline:
                raise
        # One that is about to end may accept, and hang up.
        await asyncio.sleep(AGAIN)
