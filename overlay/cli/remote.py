"""A daemon as its monitor shows it: commands and events over QMP, every wait with a time limit.

qemu.qmp's listeners go silent when the other side ends, so that each wait is raced against that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from qemu.qmp import (
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from nbdserve.common.errors import ConnectError, OperatorError

LIMIT = 10.0
"""Seconds that connecting, or a command, may take."""


class RefusedError(OperatorError):
    """The daemon refused a command."""


class GoneError(OperatorError):
    """The daemon has ended, or answers no more."""


class Remote:
    """A connection to the monitor of a daemon, made by :func:`connected`."""

    def __init__(self, path: str, client: QMPClient) -> None:
        self.path = path
        self._client = client
        self._lost = asyncio.create_task(_lost(client))

    async def execute(
        self, command: str, given: Mapping[str, object] | None = None, *, limit: float = LIMIT
    ) -> Any:
        """Return what a QMP command with these arguments returns. Raises RefusedError, GoneError."""
        try:
            # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with the answer.
            async with asyncio.timeout(limit):
                return await self._client.execute(command, given or {})
        except ExecuteError as error:
            raise RefusedError(f"{self.path}: {command} is refused: {error.error.error.desc}") from error
        except (ExecInterruptedError, StateError) as error:
            raise GoneError(f"{self.path}: the daemon has ended") from error
        except TimeoutError as error:
            raise GoneError(
                f"{self.path}: the daemon did not answer {command} within {limit:g} s; does it hang?"
            ) from error

    async def status(self) -> dict[str, Any]:
        """Return what ``query-overlay`` tells."""
        told: dict[str, Any] = await self.execute("query-overlay")
        return told

    async def job(self) -> str:
        """Return what the job is called; RefusedError if there is none."""
        told = await self.status()
        if told["job"] is None or told["phase"] in ("idle", "done"):
            state = "everything is here" if told["complete"] else "nothing is being streamed"
            raise RefusedError(f"{self.path}: {state}: there is no job")
        return str(told["job"])

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[EventListener]:
        """Listen for events of these names, in what is entered."""
        with self._client.listener(names) as listener:
            yield listener

    async def rest(self, listener: EventListener, seconds: float) -> str | None:
        """Wait until an event comes, the daemon ends, or so many seconds are over; the event's name."""
        task = asyncio.ensure_future(listener.get())
        try:
            await asyncio.wait({task, self._lost}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return str(task.result()["event"]) if task.done() else None
        finally:
            task.cancel()

    async def close(self) -> None:
        """Leave the monitor to others. Never fails."""
        self._lost.cancel()
        task = asyncio.ensure_future(self._client.disconnect())
        try:
            await asyncio.wait({task}, timeout=1.0)
        finally:
            task.cancel()
        if task.done() and not task.cancelled():
            # What went wrong on a connection that is being left was told when it happened.
            task.exception()


@contextlib.asynccontextmanager
async def connected(path: str) -> AsyncIterator[Remote]:
    """Connect to the monitor at a Unix socket; ConnectError, one line, when no daemon answers there."""
    # Its users say what happens, in one line.
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
    client = QMPClient("nbd-overlay")
    try:
        async with asyncio.timeout(LIMIT):
            await client.connect(path)
    except TimeoutError as error:
        raise ConnectError(f"{path}: the monitor does not answer within {LIMIT:g} s") from error
    except QMPError as error:
        cause = getattr(error, "exc", error)
        why = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        raise ConnectError(f"{path}: no monitor: {why}; does nbd-overlay serve --qmp run there?") from error
    remote = Remote(path, client)
    try:
        yield remote
    finally:
        await remote.close()


async def _lost(client: QMPClient) -> None:
    while client.runstate == Runstate.RUNNING:
        await client.runstate_changed()
