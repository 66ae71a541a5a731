"""A tunnel: clients of a socket on one host are led to a socket on the other, by way of ssh alone.

    nbd-migrate tunnel READY ORDERS        makes the file READY when it stands; SIGTERM ends it

    client --- SOCKET --- listen.py ==ssh==  this process  ==ssh== bridge.py --- where it leads
               one host                   any machine that has ssh           the other host

It runs where the operator's ssh leads to both hosts, and shares one connection to each, which is its own: it
needs nobody else to live. A client is one session in each, whose standard streams carry its bytes: sshd may
forbid all forwarding, and nothing listens but a Unix socket. A host that is this machine needs no ssh.

A connection that is lost takes its clients with it, who connect again as to any server; it is made again as
soon as that is possible, for as long as the tunnel lives.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from nbdserve.common import clock, program
from nbdserve.common.errors import OperatorError
from nbdserve.common.threads import Thread
from nbdserve.service.pid_file import PidFile
from recipes.connections import bridge
from recipes.connections.monitors import Passage, through
from recipes.connections.sharing import sharing
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.interruption import completed, interruptible, undisturbed
from recipes.hosts.messages import message_in

AGAIN = 1.0
"""Seconds between two attempts to make a connection that was lost."""

PIECE = 1 << 18
"""Bytes that are passed on at once."""


@dataclass(frozen=True)
class Lead:
    """A socket on one host, and where its clients are led on the other.

    what     of this is what messages call it
    at       the host of the socket, 0 for A and 1 for B
    socket   its path there; owner and mode as for nbdserve's --socket-owner and --socket-mode
    to       the path of a socket on the other host
    """

    what: str
    at: int
    socket: str
    to: str
    owner: str = ""
    mode: str = ""


@dataclass(frozen=True)
class Orders:
    """What a tunnel must know. ``limit`` is how many seconds it may take to lead a client on."""

    hosts: tuple[Host, Host]
    leads: tuple[Lead, ...]
    limit: float

    def to_json(self) -> str:
        """Return it on one line. What a host shares with somebody else is left out."""
        hosts = [{**asdict(host), "shared": (), "control": ""} for host in self.hosts]
        return json.dumps(
            {"hosts": hosts, "leads": [asdict(each) for each in self.leads], "limit": self.limit}
        )

    @classmethod
    def from_json(cls, text: str) -> Orders:
        """Return what to_json() has written."""
        told = json.loads(text)
        lists = ("shell", "options", "shared")
        a, b = (Host(**{**each, **{key: tuple(each[key]) for key in lists}}) for each in told["hosts"])
        return cls((a, b), tuple(Lead(**each) for each in told["leads"]), told["limit"])


def main(arguments: Sequence[str]) -> int:
    """Lead clients on until SIGTERM."""
    ready, orders = arguments

    def body() -> int:
        with PidFile(Path(ready)) as pid_file, suppress(asyncio.CancelledError):
            clock.run(interruptible(stand(Orders.from_json(orders), pid_file)))
        return program.EXIT_DONE

    return program.run("nbd-migrate", body)


async def stand(orders: Orders, pid_file: PidFile) -> None:
    """Stand until this is cancelled. Raises OperatorError where that does not begin."""
    async with sharing(*orders.hosts) as (a, b):
        entrances = [Entrance(lead, (a, b), orders.limit) for lead in orders.leads]
        try:
            for entrance in entrances:
                await entrance.open()
            pid_file.publish()
            async with asyncio.TaskGroup() as group:
                for entrance in entrances:
                    group.create_task(entrance.serve())
        finally:
            for entrance in entrances:
                await completed(entrance.close())


class Entrance:
    """One socket, and the clients that have come there."""

    def __init__(self, lead: Lead, hosts: tuple[Host, Host], limit: float) -> None:
        self._lead = lead
        self._here, self._there = hosts[lead.at], hosts[1 - lead.at]
        self._limit = limit
        self._end: Passage | None = None
        self._said: asyncio.StreamReader | None = None
        self._words: asyncio.StreamWriter | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen. Raises OperatorError, one line."""
        lead = self._lead
        command = self._here.own("listen", lead.socket, lead.owner, lead.mode)
        what, lacking = f"the tunnel for {lead.what}", f"{self._here.name} does not listen"
        self._end = await through(self._here, command, what, self._limit, lacking)
        assert isinstance(self._end.target, socket.socket)
        self._said, self._words = await asyncio.open_connection(sock=self._end.target)

    async def close(self) -> None:
        """End it, with all that was led on."""
        clients, self._clients = self._clients, set()
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        if self._words:
            self._words.close()
        if self._end:
            await self._end.close()
        self._end = self._words = self._said = None

    async def serve(self) -> None:
        """Lead on whoever comes; where the connection is lost, make another."""
        while True:
            await self._listen()
            say(f"the end for {self._lead.what} on {self._here.name} was lost; it is made again")
            await self.close()
            await self._open_again()

    async def _listen(self) -> None:
        """Lead on whoever comes, until the connection is lost."""
        assert self._said
        with suppress(OSError):
            while line := await self._said.readline():
                told = message_in(line)
                if "waiting" in told:
                    say(f"{self._lead.what} on {self._here.name}: {told['waiting']}; whoever comes waits")
                number = told.get("accepted")
                if isinstance(number, int):
                    client = asyncio.create_task(self._lead_on(number))
                    self._clients.add(client)
                    client.add_done_callback(self._clients.discard)

    async def _open_again(self) -> None:
        said = ""
        while True:
            await asyncio.sleep(AGAIN)
            try:
                await self.open()
            except OperatorError as error:
                await self.close()
                if str(error) != said:
                    said = str(error)
                    say(said)
                continue
            say(f"the end for {self._lead.what} on {self._here.name} is there again")
            return

    async def _lead_on(self, number: int) -> None:
        """Pass on what a client says, and what he is told, until either ends."""
        what, take = f"a client of {self._lead.what}", self._here.own("take", self._lead.socket, str(number))
        ways = [
            asyncio.create_task(
                through(self._here, take, what, self._limit, f"nothing comes from {self._here.name}")
            ),
            asyncio.create_task(self._reached(what)),
        ]
        try:
            await asyncio.wait(ways)
            faults = [error for way in ways if (error := way.exception())]
            for error in faults:
                say(str(error))
            if faults:
                self._drop(number)
            else:
                await relayed(*(_socket_of(way.result()) for way in ways))
        finally:
            await completed(_left(ways))

    async def _reached(self, what: str) -> Passage:
        """Return the way to where the clients are led."""
        lead, there = self._lead, self._there
        if there.shell:
            return await through(there, there.own("bridge", lead.to), what, self._limit, f"no {lead.to}")
        try:
            return Passage(await asyncio.to_thread(bridge.connect, lead.to))
        except OSError as error:
            raise MigrationError(f"{what}: {lead.to}: {bridge.reason_of(error)}") from error

    def _drop(self, number: int) -> None:
        if self._words:
            with suppress(OSError):
                self._words.write(f"drop {number}\n".encode())


async def _left(ways: Sequence[asyncio.Task[Passage]]) -> None:
    """See that nothing is left of these ways, wherever they had come to."""
    for way in ways:
        way.cancel()
    for made in await asyncio.gather(*ways, return_exceptions=True):
        if isinstance(made, Passage):
            await made.close()


def _socket_of(way: Passage) -> socket.socket:
    assert isinstance(way.target, socket.socket)
    return way.target


async def relayed(first: socket.socket, second: socket.socket) -> None:
    """Pass everything on between two sockets; return when one of them has ended, and the other is told."""
    loop, ends = asyncio.get_running_loop(), [asyncio.Event(), asyncio.Event()]

    def copy(source: socket.socket, target: socket.socket, ended: asyncio.Event) -> None:
        buffer = memoryview(bytearray(PIECE))
        with suppress(OSError):
            while length := source.recv_into(buffer):
                target.sendall(buffer[:length])
        # Whoever waits in the other direction is woken; what was sent stays to be read.
        _shut(source, target)
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(ended.set)

    for each in (first, second):
        each.setblocking(True)
    started = []
    try:
        for source, target, ended in ((first, second, ends[0]), (second, first, ends[1])):
            Thread(copy, "relay", source, target, ended).start()
            started.append(ended)
        await ends[0].wait()
    finally:
        _shut(first, second)
        # Until then their descriptors are used.
        for ended in started:
            await undisturbed(_set(ended))


async def _set(event: asyncio.Event) -> None:
    await event.wait()


def _shut(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def say(line: str) -> None:
    """Write a line to the log of the tunnel."""
    print(f"nbd-migrate tunnel: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
