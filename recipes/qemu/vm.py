"""One QEMU as its monitor shows it. Every wait has a time limit and ends when that QEMU does.

What qemu.qmp leaves to its user is done here: a listener is registered before the command whose event it
waits for, a wait for an event is raced against the loss of the connection (listeners go silent then), and
each command has a limit of its own, as a monitor can be blocked for the rest of a reconnect-delay.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from qemu.qmp import (
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from nbdserve.common.clock import now
from nbdserve.common.errors import ConnectError
from recipes.errors import MigrationError

T = TypeVar("T")

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

    def __init__(self, name: str, client: QMPClient, limit: float, ends: EventListener | None = None) -> None:
        self.name = name
        self._client = client
        self._limit = limit
        self._ends = ends
        self._lost = asyncio.create_task(lost(client))

    async def execute(self, command: str, *, limit: float | None = None, **arguments: object) -> Any:
        """Execute a QMP command and return its value, as call() does; ``_`` in a keyword stands for ``-``."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        return await self.call(command, given, limit=limit)

    async def call(self, command: str, given: Mapping[str, object], *, limit: float | None = None) -> Any:
        """Execute a QMP command with these arguments and return its value.

        Waits ``limit`` seconds, or else the limit given to connect(). Raises CommandError when QEMU refuses,
        VmGoneError when it ends, VmSilentError when it does not answer.
        """
        seconds = self._limit if limit is None else limit
        try:
            # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with the answer.
            async with asyncio.timeout(seconds):
                return await self._client.execute(command, given)
        except ExecuteError as error:
            reason = error.error.error.desc
            raise CommandError(f"{self.name} refused {command}: {reason}", reason) from error
        except (ExecInterruptedError, StateError) as error:
            raise VmGoneError(f"{self.name} has ended") from error
        except TimeoutError as error:
            raise VmSilentError(f"{self.name} did not answer {command} within {seconds:g} s") from error

    @contextmanager
    def events(self, *names: str) -> Iterator[EventListener]:
        """Listen for events of these names. Do so before the command that causes them."""
        with self._client.listener(names) as listener:
            yield listener

    async def next_event(self, listener: EventListener, limit: float, what: str) -> dict[str, Any]:
        """Wait for the next event: its name as ``event``, and its data.

        Raises VmGoneError, or VmSilentError with ``what`` did not happen.
        """
        event = await self.unless_gone(listener.get(), limit, what)
        return {"event": event["event"], **dict(event.get("data") or {})}  # type: ignore[call-overload]

    async def unless_gone(self, work: Awaitable[T], limit: float, what: str) -> T:
        """Wait for something for at most ``limit`` seconds, and only as long as this QEMU is there."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._lost}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if self._lost.done():
                raise VmGoneError(f"{self.name} has ended")
            raise VmSilentError(f"{self.name}: {what} did not happen within {limit:g} s")
        finally:
            task.cancel()

    @property
    def shut_down(self) -> str | None:
        """Why this QEMU has ended, or is about to, in good order (QEMU's ShutdownCause); or None."""
        history = self._ends.history if self._ends else ()
        if not history:
            return None
        data: dict[str, Any] = dict(history[-1].get("data") or {})  # type: ignore[call-overload]
        return str(data.get("reason", "unknown"))

    @property
    def connected(self) -> bool:
        """Whether the monitor is still there."""
        return not self._lost.done()

    async def gone(self) -> None:
        """Wait until the monitor has hung up, which it does when its QEMU ends."""
        await asyncio.shield(self._lost)

    async def disconnect(self) -> None:
        """Leave the monitor to others. Never fails."""
        self._lost.cancel()
        task = asyncio.ensure_future(self._client.disconnect())
        try:
            await asyncio.wait({task}, timeout=self._limit)
        finally:
            task.cancel()
        if task.done() and not task.cancelled():
            # What went wrong on a connection that is being left was told when it happened.
            task.exception()


class EndedVm(Vm):
    """A QEMU that had ended before anybody connected to its monitor."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._ends = None

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


async def connect(name: str, address: str, *, limit: float, command_limit: float) -> Vm:
    """Connect to the monitor at ``address``: a socket's path, or HOST:PORT.

    Raises ConnectError, one line, when nobody answers there within ``limit`` seconds. ``command_limit`` is
    the limit of each command, in seconds.
    """
    client = QMPClient(name)
    # From the beginning, so that no end is missed.
    ends = EventListener("SHUTDOWN")
    client.register_listener(ends)
    target = address if address.startswith("/") else host_and_port(address)
    try:
        async with asyncio.timeout(limit):
            await client.connect(target)
    except TimeoutError as error:
        raise ConnectError(
            f"{name}: its monitor at {address} accepts but does not answer within {limit:g} s; "
            "is another client connected to it?"
        ) from error
    except QMPError as error:
        cause = getattr(error, "exc", error)
        why = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        if refused(cause) and not isinstance(cause, FileNotFoundError):
            why = os.strerror(errno.ECONNREFUSED)
        raise ConnectError(f"{name}: no monitor at {address}: {why}") from error
    return Vm(name, client, command_limit, ends)


def nobody_listens(error: ConnectError) -> bool:
    """Whether connect() has failed as there is no QEMU. One that is silent, or away, may be there."""
    return refused(getattr(error.__cause__, "exc", None))


def refused(cause: object) -> bool:
    """Whether this is the error of an address at which nobody listens, or of a name with several of these."""
    if isinstance(cause, ConnectionRefusedError | FileNotFoundError):
        return True
    # asyncio makes one of what each address of a name has said; this host may be without IPv6.
    codes = {int(code) for code in re.findall(r"\[Errno ([0-9]+)\]", str(cause))}
    return errno.ECONNREFUSED in codes and codes <= {
        errno.ECONNREFUSED,
        errno.EADDRNOTAVAIL,
        errno.EAFNOSUPPORT,
    }


async def connect_again(name: str, address: str, *, limit: float, command_limit: float) -> Vm | None:
    """Connect to a monitor that has hung up; None when its QEMU has ended.

    Raises ConnectError when nobody knows after ``limit`` seconds.
    """
    deadline = now() + limit
    while True:
        try:
            return await connect(name, address, limit=limit, command_limit=command_limit)
        except ConnectError as error:
            if nobody_listens(error):
                return None
            if now() > deadline:
                raise
        # One that is about to end may accept, and hang up.
        await asyncio.sleep(AGAIN)


async def lost(client: QMPClient) -> None:
    """Wait until a client is no longer connected."""
    while client.runstate == Runstate.RUNNING:
        await client.runstate_changed()


def host_and_port(address: str) -> tuple[str, int]:
    """Take ``HOST:PORT`` apart; an IPv6 host may stand in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
