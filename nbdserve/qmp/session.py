"""One client of a monitor: greeting, negotiation, commands and their replies.

S: {"QMP": {"version": {...}, "capabilities": []}}
C: {"execute": "qmp_capabilities"}                          S: {"return": {}}
C: {"execute": NAME, "arguments": {...}, "id": ANY}         S: {"return": ANY, "id": ANY}
                                                            S: {"error": {"class", "desc"}, "id": ANY}
S: {"event": NAME, "data": {...}, "timestamp": {"seconds", "microseconds"}}
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from qemu.qmp.error import ProtocolError, QMPError
from qemu.qmp.message import Message, UnexpectedTypeError
from qemu.qmp.protocol import AsyncProtocol, Runstate

from nbdserve.common.errors import OperatorError
from nbdserve.qmp.dispatch import CommandError
from nbdserve.qmp.framer import Framer

MAX_UNREAD = 1 << 20
"""Bytes of events that a client may leave unread before it is cut off."""
_GULP = 64 << 10
_PATIENCE = 1.0
"""Seconds in which a client may take its last reply."""
_MEMBERS = {"execute", "arguments", "id"}

Run = Callable[[str, Mapping[str, object]], object]
"""Carries out a command of this name, as a Handler does; raises CommandError, OperatorError or OSError."""


class Session(AsyncProtocol[Message]):
    """The server's end of a connection. ``connect`` it with the accepted socket."""

    def __init__(self, version: Mapping[str, object], run: Run) -> None:
        super().__init__()
        self._version = version
        self._run = run
        self._framer = Framer()
        self._pieces: deque[bytes] = deque()
        self._negotiated = False

    async def serve(self, until: asyncio.Event) -> None:
        """Answer commands until the client goes away or makes no sense, or until the event.

        Then it has a moment to take its last reply.
        """
        stop = asyncio.create_task(until.wait())
        down = asyncio.create_task(self._wait_until_down())
        await asyncio.wait((stop, down), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        down.cancel()
        loop = asyncio.get_running_loop()
        hurry = loop.call_later(_PATIENCE, self.cut)
        # How the connection ended is of no interest any more.
        with contextlib.suppress(EOFError, OSError, QMPError):
            await self.disconnect()
        hurry.cancel()

    async def _wait_until_down(self) -> None:
        while self.runstate is Runstate.RUNNING:
            await self.runstate_changed()

    def cut(self) -> None:
        """Close the connection without another word."""
        if self._writer is not None:
            self._writer.transport.abort()

    def tell(self, event: Message) -> None:
        """Send an event; a client that does not read them is cut off."""
        if self._negotiated and self._writer is not None:
            self._do_send(event)
            if self._writer.transport.get_write_buffer_size() > MAX_UNREAD:
                self.cut()

    async def _establish_session(self) -> None:
        await self._send(Message({"QMP": {"version": self._version, "capabilities": []}}))
        await super()._establish_session()

    async def _do_recv(self) -> Message:
        """The next command that is JSON; what is not is answered here."""
        while True:
            while not self._pieces:
                assert self._reader is not None
                data = await self._reader.read(_GULP)
                if not data:
                    raise EOFError
                self._pieces.extend(self._framer.feed(data))
            try:
                return Message(self._pieces.popleft())
            except UnexpectedTypeError:
                await self._send(_refusal("QMP input must be a JSON object"))
            except (ProtocolError, ValueError) as error:
                await self._send(_refusal(f"JSON parse error, {error.__cause__ or error}"))

    def _do_send(self, message: Message) -> None:
        assert self._writer is not None
        self._writer.write(bytes(message) + b"\r\n")

    async def _send(self, message: Message) -> None:
        """Send, and wait for a client that does not read: until then it gets no other command carried out."""
        await super()._send(message)
        assert self._writer is not None
        await self._writer.drain()

    async def _on_message(self, message: Message) -> None:
        reply = await self._answer(message)
        if "id" in message:
            reply["id"] = message["id"]
        await self._send(reply)

    async def _answer(self, message: Message) -> Message:
        try:
            result = self._execute(message)
            if isinstance(result, Future):
                result = await asyncio.wrap_future(result)
            return Message({"return": {} if result is None else result})
        except CommandError as error:
            return _refusal(str(error), error.kind)
        except OperatorError as error:
            return _refusal(str(error))
        except OSError as error:
            return _refusal(f"{error.filename}: {error.strerror}" if error.filename else str(error))

    def _execute(self, message: Message) -> object:
        for member in message:
            if member not in _MEMBERS:
                raise CommandError(f"QMP input member '{member}' is unexpected")
        name, arguments = message.get("execute"), message.get("arguments", {})
        if name is None:
            raise CommandError("QMP input lacks member 'execute'")
        if not isinstance(name, str):
            raise CommandError("QMP input member 'execute' must be a string")
        if not isinstance(arguments, dict):
            raise CommandError("QMP input member 'arguments' must be an object")
        if not self._negotiated:
            return self._negotiate(name, arguments)
        return self._run(name, arguments)

    def _negotiate(self, name: str, arguments: Mapping[str, object]) -> object:
        if name != "qmp_capabilities":
            raise CommandError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        if arguments.get("enable") or set(arguments) - {"enable"}:
            raise CommandError("no capabilities can be enabled here")
        self._negotiated = True
        return {}


def _refusal(description: str, kind: str = "GenericError") -> Message:
    return Message({"error": {"class": kind, "desc": description}})
