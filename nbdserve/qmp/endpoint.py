"""The monitor: a socket, a thread of its own, and the commands that every monitor has."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Mapping

from qemu.qmp.message import Message
from qemu.qmp.protocol import ConnectError

from nbdserve import __version__
from nbdserve.common.threads import Thread
from nbdserve.connection.accepting import ACCEPT_PAUSE, AcceptFailures
from nbdserve.connection.listeners import Listener
from nbdserve.qmp.dispatch import Command, CommandError, Handler
from nbdserve.qmp.session import Session

_LOG = logging.getLogger("nbdserve")
MAX_SESSIONS = 16
"""Clients at a time; more wait."""
_END = 5.0
"""Seconds in which the thread must end."""


class Monitor:
    """Carries out commands, one after the other, whichever client they come from; tells all of events.

    Handlers run in the monitor's thread and must be quick, or return a Future: then only their client waits.
    ``program`` is what clients are told they talk to.
    """

    def __init__(self, listener: Listener, program: str, commands: Mapping[str, Handler]) -> None:
        self._listener = listener
        own: dict[str, Handler] = {
            "qmp_capabilities": self._qmp_capabilities,
            "query-commands": self._query_commands,
            "query-version": self._query_version,
        }
        self._commands = {name: Command(handler) for name, handler in {**own, **commands}.items()}
        major, minor, micro = (int(part) for part in __version__.split("."))
        qemu = {"major": major, "minor": minor, "micro": micro}
        self._version = {"qemu": qemu, "package": f"{program} {__version__}"}
        self._sessions: set[Session] = set()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = Thread(self._run, "monitor")

    def start(self) -> None:
        """Serve clients from now on."""
        self._thread.start()

    def emit(self, event: str, data: Mapping[str, object] | None = None) -> None:
        """Tell every client of an event. May be called from any thread, also after ``close``."""
        now = time.time()
        stamp = {"seconds": int(now), "microseconds": int(now % 1 * 1e6)}
        message = Message(
            {"timestamp": stamp, "event": event, **({"data": data} if data is not None else {})}
        )
        # Closed: nobody is left to be told.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._tell, message)

    def close(self) -> None:
        """Let clients have the replies they are owed, and end."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_END)

    def _run(self) -> None:
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        attending: set[asyncio.Task[None]] = set()
        accepting = self._loop.create_task(self._accept(attending))
        await self._stop.wait()
        accepting.cancel()
        await asyncio.gather(*attending, return_exceptions=True)

    async def _accept(self, attending: set[asyncio.Task[None]]) -> None:
        room, failures = asyncio.Semaphore(MAX_SESSIONS), AcceptFailures()
        while True:
            await room.acquire()
            try:
                sock, _ = await self._loop.sock_accept(self._listener.sock)
            except OSError as error:
                if failures.is_news(error):
                    _LOG.warning("monitor: cannot accept a client: %s", error.strerror or error)
                room.release()
                await asyncio.sleep(ACCEPT_PAUSE)
                continue
            task = self._loop.create_task(self._attend(sock))
            attending.add(task)
            task.add_done_callback(attending.discard)
            task.add_done_callback(lambda _: room.release())

    async def _attend(self, sock: socket.socket) -> None:
        session = Session(self._version, self._execute)
        self._sessions.add(session)
        try:
            await session.connect(sock)
            _LOG.debug("monitor: a client has come")
            await session.serve(self._stop)
        except ConnectError as error:
            _LOG.debug("monitor: a client went away: %s", error)
        finally:
            self._sessions.discard(session)

    def _tell(self, event: Message) -> None:
        for session in self._sessions:
            session.tell(event)

    def _execute(self, name: str, arguments: Mapping[str, object]) -> object:
        command = self._commands.get(name)
        if command is None:
            raise CommandError(f"The command {name} has not been found", "CommandNotFound")
        return command.run(arguments)

    def _qmp_capabilities(self, enable: list[str] | None = None) -> None:
        raise CommandError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")

    def _query_commands(self) -> object:
        return [{"name": name} for name in sorted(self._commands)]

    def _query_version(self) -> object:
        return self._version
