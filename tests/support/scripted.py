"""A monitor that says what a test wants, right or wrong."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

GREETING = {"QMP": {"version": {"qemu": {"major": 1, "minor": 0, "micro": 0}}, "capabilities": []}}


class Peer:
    """A monitor's end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._text = ""

    def send(self, *messages: object) -> None:
        """Send messages, or text as it is."""
        for message in messages:
            text = message if isinstance(message, str) else json.dumps(message)
            self._writer.write(text.encode() + b"\n")

    async def greet(self) -> None:
        """Negotiate with the client."""
        self.send(GREETING)
        assert (await self.command())["execute"] == "qmp_capabilities"
        self.send({"return": {}})

    async def command(self) -> dict[str, Any]:
        """What the client sends next; the library ends no line."""
        while True:
            try:
                command, end = json.JSONDecoder().raw_decode(self._text)
            except ValueError:
                data = await self._reader.read(1 << 16)
                if not data:
                    raise EOFError from None
                self._text += data.decode()
                continue
            self._text = self._text[end:].lstrip()
            assert isinstance(command, dict)
            return command

    async def answer(self, **reply: object) -> None:
        """Take a command and send this reply to it."""
        self.send({"id": (await self.command())["id"], **reply})

    async def hung_up(self) -> None:
        """Read on until the client has gone."""
        try:
            while await self._reader.read(1 << 16):
                pass
        except ConnectionError:
            pass

    def hang_up(self) -> None:
        """Close the connection."""
        self._writer.close()


@asynccontextmanager
async def scripted(path: Path, talk: Callable[[Peer], Awaitable[None]]) -> AsyncIterator[None]:
    """Listen at a Unix socket and talk to one client; at the end that must have been to the end."""
    loop = asyncio.get_running_loop()
    talking: asyncio.Future[asyncio.Task[object]] = loop.create_future()

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talking.set_result(task)
        try:
            await talk(Peer(reader, writer))
        finally:
            writer.close()

    server = await asyncio.start_unix_server(attend, path)
    try:
        yield
        await (await talking)
    finally:
        server.close()


def full(path: Path) -> list[socket.socket]:
    """A socket in whose queue nobody has a place any more; who waits in it comes last."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(0)
    waiting = [listening]
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        try:
            client.connect(str(path))
        except BlockingIOError:
            client.close()
            return waiting
        waiting.append(client)
