"""What the guard does when the orchestrator is dead: the guest goes on where it is, the rest is cleared.

It decides as the orchestrator would have (recipes/qemu/source.py). Where it is not known who has the guest,
nothing is ended and nothing is told to go on.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from nbdserve.common.errors import ConnectError
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.migrate.leftovers import but, remove
from recipes.processes.children import stream
from recipes.qemu.destination import Destination, has_guest
from recipes.qemu.source import Side, give_back, leave_alone
from recipes.qemu.vm import Vm, VmGoneError, connect, connect_again, nobody_listens

MESSAGE = 1 << 16
"""Longest message in bytes."""

SWITCH_OVER = 10.0
"""Seconds that a switch-over which is under way is given to come to its end."""

GRACE = 5.0
"""Seconds from SIGTERM to SIGKILL for a child."""

END = 15.0
"""Seconds until a child that was told to stop must have ended."""

HERE = Host("this host")


@dataclass(frozen=True)
class Orders:
    """What the guard must know of a migration.

    source        QMP address of A's QEMU
    destination   QMP address of B's QEMU
    capabilities  migration capabilities that were on at A before
    owned         the children end with the orchestrator in any case
    limit         seconds for a connection to a monitor, and for a command
    shell         prefix of a command for B, and ``options`` for its ssh
    """

    source: str
    destination: str
    capabilities: Sequence[str]
    owned: bool
    limit: float
    shell: Sequence[str] = ()
    options: Sequence[str] = ()


@dataclass
class Watched:
    """A child: the ends of its keeper's pipes, and how to kill it when its keeper is dead."""

    name: str
    words: int
    messages: int
    kill: Sequence[str] = ()


@dataclass
class Watch:
    """What the guard was told until now."""

    orders: Orders
    children: list[Watched] = field(default_factory=list)
    removal: list[str] = field(default_factory=list)
    migrating: bool = False
    go_on: str = ""

    def listen(self, channel: socket.socket) -> bool:
        """Take messages; True when the orchestrator has died, False when it has dismissed us."""
        while True:
            data, fds, _, _ = socket.recv_fds(channel, MESSAGE, 2)
            if not data:
                return True
            [(kind, value)] = json.loads(data).items()
            if kind == "share":
                self.children.append(Watched(value, fds[0], fds[1]))
            elif kind == "kill":
                name, argv = value
                child = next(each for each in reversed(self.children) if each.name == name)
                child.kill = argv
            elif kind == "go on":
                self.go_on = value
            elif kind == "remove":
                self.removal = value
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
            try:
                return await self._decide(a)
            except VmGoneError as error:
                # It has ended, unless only the connection was lost; then somebody must look.
                again = await connect_again("A's QEMU", self.orders.source, **self._limits)
                if again is None:
                    return await self._without_source(error, ended=True)
                await again.disconnect()
                raise self._nobody_knows(error) from error
            except MigrationError as error:
                raise self._nobody_knows(error) from error
            finally:
                await a.disconnect()
        except ConnectError as error:
            return await self._without_source(error, ended=nobody_listens(error))

    async def _decide(self, a: Vm) -> str:
        """Let the guest go on where it is, as A's QEMU says."""
        if not self.migrating:
            try:
                where = await leave_alone(a, self.orders.capabilities)
            except VmGoneError:
                raise
            except MigrationError as error:
                where = f"the guest was left on A, but look at it: {error}"
            return but(where, *await self._clear())
        said: list[str] = []
        side = await give_back(
            a, self._end_children, self.orders.capabilities, grace=SWITCH_OVER, tell=said.append
        )
        if side is Side.SOURCE:
            return but("the guest runs on A as before", *said, *await self._clear())
        self.release_children()
        with suppress(MigrationError):
            await a.execute("quit")
        return f"the guest runs on B; A's QEMU was ended; {self._unfinished}"

    async def _without_source(self, error: Exception, *, ended: bool) -> str:
        """A's QEMU has ended, or does not answer: only B's can have the guest."""
        destination = Destination.NONE
        if self.migrating:
            destination = await has_guest(self.orders.destination, self.orders.limit)
        if destination is Destination.HAS_GUEST:
            self.release_children()
            return f"A's QEMU is gone; the guest runs on B; {self._unfinished}"
        if destination is Destination.SILENT or (destination is Destination.WAITS and not ended):
            raise self._nobody_knows(MigrationError(str(error)))
        where = f"what was started has been ended, but the guest on A was not reached: {error}"
        raise MigrationError(but(where, *await self._clear()))

    def _nobody_knows(self, error: MigrationError) -> MigrationError:
        """Let everything live on; the line that says so, to be raised."""
        if not self.children:
            # The guest is A's, as what was started has been ended, and it cannot go on.
            return error
        self.release_children()
        return MigrationError(
            f"it is not known where the guest is: {error}; nothing was ended; look at query-migrate on "
            "A, then at query-status on B, before anything else"
        )

    @property
    def _limits(self) -> dict[str, float]:
        return {"limit": self.orders.limit, "command_limit": self.orders.limit}

    @property
    def _unfinished(self) -> str:
        return f"its disk is not complete yet; to complete it: {self.go_on}"

    def release_children(self) -> None:
        """Let the children live on by themselves, unless they are owned."""
        if not self.orders.owned:
            for child in self.children:
                tell(child, "release")

    async def _end_children(self) -> None:
        """Stop every child, the youngest first; MigrationError when one does not end."""
        for child in reversed(self.children):
            tell(child, f"stop {GRACE:g}")
            os.close(child.words)
        children = self.children[::-1]
        ends = await asyncio.gather(*(ended(child) for child in children))
        stubborn = [child.name for child, end in zip(children, ends, strict=True) if not end]
        self.children.clear()
        if stubborn:
            raise MigrationError(f"{' and '.join(stubborn)} did not end within {END:g} s")

    async def _clear(self) -> list[str]:
        """End what was started and remove what was made; return a phrase for each that is left."""
        left = []
        try:
            await self._end_children()
        except MigrationError as error:
            left.append(str(error))
        if self.removal:
            host_b = Host("B", tuple(self.orders.shell), options=tuple(self.orders.options))
            left += await remove(host_b, self.removal, self.orders.limit)
        return left


def tell(child: Watched, word: str) -> None:
    """Give the child's keeper, which may be dead, a word."""
    with suppress(BrokenPipeError):
        os.write(child.words, f"{word}\n".encode())


async def ended(child: Watched) -> bool:
    """Wait for a child's end; False when it does not end in time.

    Where its keeper is dead, or was stopped (SIGSTOP) and ends nothing, the child is killed.
    """
    said = b""
    reader = await stream(child.messages)
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(END):
                while data := await reader.read(4096):
                    said += data
        if b'"exited"' not in said and child.kill:
            await HERE.run(*child.kill, limit=END)
    except MigrationError:
        return False
    return b'"exited"' in said or bool(child.kill) or reader.at_eof()
