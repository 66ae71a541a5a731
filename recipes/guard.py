"""The guard: a second process that acts when the orchestrator is killed in the middle of a migration.

Keepers alone cannot do that: an orchestrator that dies while the guest stands still before the switch-over
would leave it standing, and one that dies during the switch-over leaves it open which QEMU may live. The
guard holds every child's lifeline too, so nothing ends before it has asked the source who has the guest. Then
it either gives the guest back to the source and ends the children, or releases them.

The orchestrator's end is Guard; the process is this module. They share a socket of messages,
and the end of file on it is the orchestrator's death.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from nbdserve import clock, command
from nbdserve.errors import ConnectError, MigrationError, OperatorError
from recipes.children import Child, stream
from recipes.host import Host, module
from recipes.source import Side, give_back, leave_alone
from recipes.vm import VmGoneError, connect

MESSAGE = 1 << 16
"""Longest message in bytes."""

SETTLE = 10.0
"""Seconds that a switch-over which is under way is given to come to its end."""

END = 15.0
"""Seconds until a child whose lifeline was cut must have ended."""


@dataclass(frozen=True)
class Orders:
    """What the guard must know of a migration.

    source        QMP address of A's QEMU
    destination   QMP address of B's QEMU
    capabilities  migration capabilities that were on at A before
    owned         the children end with the orchestrator in any case
    limit         seconds for a connection to a monitor, and for a command
    """

    source: str
    destination: str
    capabilities: Sequence[str]
    owned: bool
    limit: float


class Guard:
    """The orchestrator's end, made by start_guard()."""

    def __init__(self, process: asyncio.subprocess.Process, channel: socket.socket) -> None:
        self._process = process
        self._channel = channel

    @property
    def pid(self) -> int:
        """The guard's process id."""
        return self._process.pid

    def watch(self, child: Child) -> None:
        """Share a child's life."""
        self._send("child", child.name, child.lifeline)

    def remove_later(self, argv: Sequence[str]) -> None:
        """When the guest is given back to A, run this command, which removes what the migration has made."""
        self._send("remove", list(argv))

    def migrating(self) -> None:
        """From now on A's QEMU may be migrating for us; before, a migration there is somebody else's."""
        self._send("migrating", None)

    async def wait(self) -> str:
        """Wait until the guard has ended, which it does not do by itself; return how, in words."""
        status = await self._process.wait()
        return f"ended with status {status}"

    def dismiss(self) -> None:
        """Let the guard go: nothing that happens from now on concerns it."""
        if self._channel.fileno() >= 0:
            self._send("dismiss", None)
            self._channel.close()

    async def close(self) -> None:
        """Dismiss the guard and wait until it has ended. The orchestrator has decided where the guest is."""
        self.dismiss()
        await self._process.wait()

    def _send(self, kind: str, value: object, fds: Sequence[int] = ()) -> None:
        # A guard that was killed is noticed by wait().
        with suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._channel, [json.dumps({kind: value}).encode()], fds)


async def start_guard(orders: Orders) -> Guard:
    """Start the guard of this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        argv = module("guard", json.dumps(asdict(orders)))
        process = await asyncio.create_subprocess_exec(*argv, stdin=theirs.fileno(), start_new_session=True)
    return Guard(process, ours)


@dataclass
class Watch:
    """The guard's own side: what it was told until now. A lifeline is a keeper's (input, output)."""

    orders: Orders
    lifelines: list[tuple[int, int]] = field(default_factory=list)
    removals: list[list[str]] = field(default_factory=list)
    migrating: bool = False

    def listen(self, channel: socket.socket) -> bool:
        """Take messages; True when the orchestrator has died, False when it has dismissed us."""
        while True:
            data, fds, _, _ = socket.recv_fds(channel, MESSAGE, 2)
            if not data:
                return True
            [(kind, value)] = json.loads(data).items()
            if kind == "child":
                self.lifelines.append((fds[0], fds[1]))
            elif kind == "remove":
                self.removals.append(value)
            elif kind == "migrating":
                self.migrating = True
            else:
                return False

    async def act(self) -> str:
        """Do what the orchestrator can no longer do; return one line about it.

        Raises MigrationError, whose line says what is left for the operator.
        """
        try:
            a = await connect("A's QEMU", self.orders.source, **self._limits)
        except ConnectError as error:
            return await self._without_source(error)
        try:
            if not self.migrating:
                await self.end_children()
                await self.remove()
                return await leave_alone(a, self.orders.capabilities)
            side = await give_back(a, self.end_children, self.orders.capabilities, settle=SETTLE)
            if side is Side.DESTINATION:
                self.release_children()
                with suppress(VmGoneError):
                    await a.execute("quit")
                return "the guest runs on B; A's QEMU was ended; the disk is not complete: " + GO_ON
            await self.remove()
            return "the guest runs on A as before"
        finally:
            await a.disconnect()

    async def _without_source(self, error: ConnectError) -> str:
        if await self._destination_runs():
            self.release_children()
            return f"A's QEMU is gone; the guest runs on B; the disk is not complete: {GO_ON}"
        await self.end_children()
        await self.remove()
        raise MigrationError(f"what was started has been ended, but the guest on A was not reached: {error}")

    async def _destination_runs(self) -> bool:
        try:
            b = await connect("B's QEMU", self.orders.destination, **self._limits)
        except ConnectError:
            return False
        try:
            return bool((await b.execute("query-status"))["running"])
        finally:
            await b.disconnect()

    @property
    def _limits(self) -> dict[str, float]:
        return {"limit": self.orders.limit, "command_limit": self.orders.limit}

    def release_children(self) -> None:
        """Let the children live on by themselves, unless they are owned."""
        if not self.orders.owned:
            for lifeline, _ in self.lifelines:
                with suppress(BrokenPipeError):
                    os.write(lifeline, b"release\n")

    async def end_children(self) -> None:
        """Cut the lifelines and wait until every child has ended; MigrationError when one does not."""
        for lifeline, _ in self.lifelines:
            os.close(lifeline)
        for _, messages in self.lifelines:
            reader = await stream(messages)
            try:
                async with asyncio.timeout(END):
                    await reader.read()
            except TimeoutError as error:
                raise MigrationError(
                    f"a process did not end within {END:g} s, so A was left as it is"
                ) from error
        self.lifelines.clear()

    async def remove(self) -> None:
        """Remove what the migration has made."""
        for argv in self.removals:
            await Host("this host").run(*argv, limit=self.orders.limit)


GO_ON = "keep the server on A running and stream by hand (recipes/05-stream.sh, then 06-shutdown.sh)"


def main(arguments: Sequence[str]) -> int:
    """Watch until the orchestrator dies or dismisses us; return an exit code."""
    # Whoever ends the orchestrator by a signal to its group or terminal must not end the guard with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    watch = Watch(Orders(**json.loads(arguments[0])))
    with socket.socket(fileno=0) as channel:
        orphaned = watch.listen(channel)
    if not orphaned:
        return command.EXIT_DONE

    def body() -> int:
        try:
            command.complain("nbd-migrate", f"the orchestrator was killed: {clock.run(watch.act())}")
        except OperatorError as error:
            raise MigrationError(f"the orchestrator was killed: {error}") from error
        return command.EXIT_DONE

    return command.run("nbd-migrate", body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
