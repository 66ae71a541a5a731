"""A daemon as its monitor shows it: what nbd-overlay's own commands tell, every wait with a time limit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any

from nbdserve.common.errors import ConnectError, OperatorError
from nbdserve.qmp.client import (
    EventListener,
    GoneError,
    MonitorClient,
    MonitorError,
    QueuedError,
    RefusedError,
    SilentError,
    UnreachableError,
    connect,
)

LIMIT = 10.0
"""Seconds that connecting, or a command, may take."""
FAREWELL = 1.0
"""Seconds that leaving may take."""


class NoJobError(OperatorError):
    """The daemon copies nothing that could be told to pause, or to go faster."""


class Remote:
    """A connection to the monitor of a daemon, made by :func:`connected`."""

    def __init__(self, path: str, client: MonitorClient) -> None:
        self.path = path
        self._client = client

    async def execute(
        self, command: str, given: Mapping[str, object] | None = None, *, limit: float = LIMIT
    ) -> Any:
        """Return what a QMP command with these arguments returns. Raises RefusedError, GoneError."""
        try:
            return await self._client.execute(command, given or {}, limit=limit)
        except RefusedError as error:
            message = f"{self.path}: {command} is refused: {error.reason}"
            raise RefusedError(message, error.reason) from error
        except SilentError as error:
            raise GoneError(f"{self.path}: {error}; does it hang?") from error
        except MonitorError as error:
            raise GoneError(f"{self.path}: {error}") from error

    async def status(self) -> dict[str, Any]:
        """Return what ``query-overlay`` tells."""
        told: dict[str, Any] = await self.execute("query-overlay")
        return told

    async def job(self) -> str:
        """Return what the job is called; NoJobError if there is none."""
        told = await self.status()
        if told["job"] is None or told["phase"] in ("idle", "done"):
            state = "everything is here" if told["complete"] else "nothing is being streamed"
            raise NoJobError(f"{self.path}: {state}: there is no job")
        return str(told["job"])

    def events(self, *names: str) -> AbstractContextManager[EventListener]:
        """Listen for events of these names, in what is entered."""
        return self._client.events(*names)

    async def rest(self, listener: EventListener, seconds: float) -> str | None:
        """Wait until an event comes, the daemon ends, or so many seconds are over; the event's name."""
        try:
            return str((await self._client.next_event(listener, limit=seconds))["event"])
        except (GoneError, SilentError):
            return None


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[Remote]:
    """Connect to the monitor at a Unix socket; ConnectError, one line, when no daemon answers there."""
    try:
        client = await connect(path, name="the daemon", limit=LIMIT)
    except QueuedError as error:
        raise ConnectError(
            f"{path}: the monitor lets nobody in within {LIMIT:g} s, as others wait for it already"
        ) from error
    except SilentError as error:
        raise ConnectError(f"{path}: the monitor does not answer within {LIMIT:g} s") from error
    except UnreachableError as error:
        raise ConnectError(
            f"{path}: no monitor: {error.reason}; does nbd-overlay serve --qmp run there?"
        ) from error
    try:
        yield Remote(path, client)
    finally:
        await client.close(limit=FAREWELL)
