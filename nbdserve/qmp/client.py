"""A monitor's client. Every wait has a time limit, and ends when the other side does.

Messages are those of the library qemu.qmp, and so is the life of a connection. What that leaves to its user
is done here: each command has a limit, as a monitor can be blocked; a wait for an event ends with the
connection, where the library's listeners only go silent; what nobody listens for is not kept.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from qemu.qmp.error import ProtocolError

from nbdserve.common.errors import ConnectError, OperatorError

__all__ = [
    "EventListener",
    "GoneError",
    "MonitorClient",
    "MonitorError",
    "QueuedError",
    "RefusedError",
    "SilentError",
    "UnreachableError",
    "connect",
]

QUEUE = 0.05
"""Seconds between two attempts to get into a queue that is full."""

CUT = 1.0
"""Seconds in which a connection that was cut off must be over."""


class MonitorError(OperatorError):
    """A monitor's other side does not do what is asked of it; itself, when an answer makes no sense."""


class RefusedError(MonitorError):
    """It refused a command; ``reason`` is what it said."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class GoneError(MonitorError):
    """It has ended, or hung up."""


class SilentError(MonitorError):
    """It did not answer, or what was waited for did not happen, within the limit."""


class QueuedError(SilentError):
    """So many wait for it already that nobody else is let in."""


class UnreachableError(ConnectError):
    """There is no monitor at an address: why, and whether that is because nobody listens there at all.

    Who is away, or speaks something else, may be there all the same.
    """

    def __init__(self, message: str, reason: str, *, nobody_listens: bool) -> None:
        super().__init__(message)
        self.reason = reason
        self.nobody_listens = nobody_listens


class MonitorClient:
    """A connection to a monitor, made by connect(). Only for tasks of the event loop that made it."""

    def __init__(self, name: str, connection: _Connection) -> None:
        """``name`` is what messages call the other side."""
        self.name = name
        self._connection = connection
        self._lost = asyncio.create_task(_lost(connection))

    async def execute(self, command: str, arguments: Mapping[str, object], *, limit: float) -> Any:
        """Execute a command and return its value, within ``limit`` seconds.

        Raises RefusedError, GoneError, SilentError, or MonitorError for what is no answer.
        """
        try:
            # Not wait_for: in Python 3.11 it swallows a cancellation that comes together with the answer.
            async with asyncio.timeout(limit):
                return await self._connection.execute(command, arguments)
        except ExecuteError as error:
            reason = error.error.error.desc
            raise RefusedError(f"{self.name} refused {command}: {reason}", reason) from error
        except (ExecInterruptedError, StateError) as error:
            raise GoneError(f"{self.name} has ended") from error
        except TimeoutError as error:
            raise SilentError(f"{self.name} did not answer {command} within {limit:g} s") from error
        except ProtocolError as error:
            raise MonitorError(f"{self.name} answered {command} with what is no reply of QMP's") from error

    @contextmanager
    def events(self, *names: str) -> Iterator[EventListener]:
        """Listen for events of these names. Do so before the command that causes them."""
        with self._connection.listener(names) as listener:
            yield listener

    async def next_event(
        self, listener: EventListener, *, limit: float, what: str = "an event"
    ) -> dict[str, Any]:
        """Wait for the next event, ``limit`` seconds at most: its name as ``event``, and its data.

        What came before the other side's end is told before that. Raises GoneError, or SilentError with
        ``what`` did not happen. A wait that is cancelled takes no event with it.
        """

        def end(_: object) -> None:
            # It may be over: the event came together with the end.
            with suppress(RuntimeError):
                scope.reschedule(asyncio.get_running_loop().time())

        try:
            async with asyncio.timeout(limit) as scope:
                self._lost.add_done_callback(end)
                event = await listener.get()
        except TimeoutError as error:
            if listener.empty():
                if self._lost.done():
                    raise GoneError(f"{self.name} has ended") from error
                raise SilentError(f"{self.name}: {what} did not happen within {limit:g} s") from error
            event = await listener.get()
        finally:
            self._lost.remove_done_callback(end)
        return {"event": event["event"], **dict(event.get("data") or {})}  # type: ignore[call-overload]

    @property
    def connected(self) -> bool:
        """Whether the monitor is still there."""
        return not self._lost.done()

    async def gone(self) -> None:
        """Wait until the connection is over: the other side has hung up, or close() was called here."""
        await asyncio.shield(self._lost)

    async def close(self, *, limit: float) -> None:
        """Leave the monitor to others. Never fails; a connection that takes longer than this is cut off."""
        leaving = asyncio.create_task(self._connection.disconnect())
        leaving.add_done_callback(_retrieve)
        try:
            await asyncio.wait({leaving}, timeout=limit)
        finally:
            if not leaving.done():
                self._connection.cut()
                await asyncio.wait({leaving}, timeout=CUT)
                leaving.cancel()
        # It ends by itself, as this is no longer connected; whoever waits in gone() is not cancelled.
        await self.gone()


async def connect(
    address: str | tuple[str, int] | socket.socket,
    *,
    name: str,
    limit: float,
    listeners: Iterable[EventListener] = (),
) -> MonitorClient:
    """Connect to the monitor at a Unix socket's path, or at a host and a port, within ``limit`` seconds.

    A socket is one whose other end is a monitor already, and is the connection's from now on.
    ``listeners`` are told of events from the very beginning, so that none is missed. Raises SilentError when
    somebody is there and says nothing (QueuedError: not even takes the connection), UnreachableError
    otherwise.
    """
    connection = _Connection(name)
    for listener in listeners:
        connection.register_listener(listener)
    taken: str | tuple[str, int] | socket.socket = address
    try:
        async with asyncio.timeout(limit):
            if isinstance(address, str):
                taken = await _queued(address)
            await connection.connect(taken)
    except TimeoutError as error:
        if isinstance(taken, str):
            raise QueuedError(f"{name} lets nobody in within {limit:g} s: its queue is full") from error
        raise SilentError(f"{name} did not answer within {limit:g} s") from error
    except OSError as error:
        reason, nobody = _reason(error), _nobody_listens(error)
        raise UnreachableError(f"{name}: no monitor: {reason}", reason, nobody_listens=nobody) from error
    except QMPError as error:
        cause = getattr(error, "exc", error)
        reason, nobody = _reason(cause), _nobody_listens(cause)
        raise UnreachableError(f"{name}: no monitor: {reason}", reason, nobody_listens=nobody) from error
    except AssertionError:
        # The library's, when the other side hangs up right after its last answer: then the client is lost.
        if connection.runstate != Runstate.DISCONNECTING:
            raise
    return MonitorClient(name, connection)


class _Connection(QMPClient):
    """The library's connection; it keeps no events that nobody listens for, and can be cut off."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # A listener of the library's own would keep all events, for as long as the connection lives.
        self.events.event_filter = lambda _: False

    def cut(self) -> None:
        """Close the connection without another word."""
        if self._writer is not None:
            self._writer.transport.abort()


async def _queued(path: str) -> socket.socket:
    """Connect to a Unix socket; wait for a place in its queue, for as long as the caller lets us.

    asyncio takes the EAGAIN of a full queue for a connection that is on its way, which no Unix socket's is:
    the first that is sent then fails with EINVAL. Raises OSError.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                await asyncio.sleep(QUEUE)
    except BaseException:
        sock.close()
        raise


async def _lost(connection: QMPClient) -> None:
    """Wait until it is no longer connected."""
    while connection.runstate == Runstate.RUNNING:
        await connection.runstate_changed()


def _retrieve(leaving: asyncio.Task[None]) -> None:
    """What went wrong on a connection that is being left was told when it happened."""
    if not leaving.cancelled():
        leaving.exception()


def _reason(cause: Exception) -> str:
    """Why there is no monitor, on one line."""
    if _nobody_listens(cause) and not isinstance(cause, FileNotFoundError):
        return os.strerror(errno.ECONNREFUSED)
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(text.split())


def _nobody_listens(cause: Exception) -> bool:
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
