"""What the guard does when the orchestrator is dead: the guest goes on where it is, the rest is cleared.

It decides as the orchestrator would have (decide.py). Where it is not known who has the guest,
nothing is ended and nothing is told to go on.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nbdserve.exports.moved_images import Standing
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.images import put_away
from recipes.migrate.decide import UNKNOWN, Action, Wish
from recipes.migrate.journal import Journal
from recipes.migrate.leftovers import remove_channel, remove_exporter, remove_made
from recipes.migrate.state import NAMES, Phase, Role, State, entered
from recipes.migrate.way_back import GRACE as SWITCH_OVER
from recipes.migrate.way_back import Hands, Verdict, WayBack
from recipes.plans.reaching import hosts, monitor_a, monitor_b
from recipes.processes.speaking import stream
from recipes.qemu.destination import look
from recipes.qemu.facts import OnA, OnB
from recipes.qemu.vm import Vm, connect_again

MESSAGE = 1 << 16
"""Longest message in bytes."""

GRACE = 5.0
"""Seconds from SIGTERM to SIGKILL for a child."""

END = 15.0
"""Seconds until a child that was told to stop must have ended."""

HERE = Host("this host")


@dataclass(frozen=True)
class Orders:
    """What the guard must know of a migration besides its journal.

    journal  the directory of the journal, and ``file`` its file descriptor
    lock     file descriptor of its lock, which the guard shares
    owned    the children end with the orchestrator in any case
    control  the directory of the connections that it shares with the hosts, or nothing
    """

    journal: str
    file: int
    lock: int
    owned: bool
    control: str = ""


@dataclass
class Watched:
    """A child: the ends of its supervisor's pipes, and how to kill it when its supervisor is dead."""

    name: str
    words: int
    messages: int
    kill: Sequence[str] = ()


class Watch(Hands):
    """What the guard was told until now, and what it can do when the orchestrator is dead."""

    def __init__(self, orders: Orders) -> None:
        super().__init__()
        self.orders = orders
        self.children: list[Watched] = []
        self._journal: Journal | None = None
        self._a: Vm | None = None
        self._hosts = (HERE, HERE)

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
            else:
                return False

    async def act(self) -> str:
        """Do what the orchestrator can no longer do; return one line about it.

        Raises MigrationError, whose line says what is left for the operator.
        """
        try:
            self._journal = Journal.inherit(Path(self.orders.journal), self.orders.file, self.orders.lock)
            state = self.state
        except MigrationError as error:
            raise self._nobody_knows(str(error)) from error
        self._journal.lock.sign()
        async with hosts(state.plan, self.orders.control) as self._hosts:
            return await self._act(state)

    async def _act(self, state: State) -> str:
        way = WayBack(self, state, wish=Wish.GO_BACK, grace=SWITCH_OVER)
        try:
            verdict = await way.go()
            if verdict.action is Action.KEEP_B:
                return await self._keep_b(verdict)
        except MigrationError as error:
            raise self._nobody_knows(str(error)) from error
        finally:
            if self._a:
                await self._a.disconnect()
        if verdict.action is Action.KEEP:
            raise self._nobody_knows(verdict.where)
        if verdict.facts.a in (OnA.GONE, OnA.SILENT):
            raise MigrationError(verdict.where)
        return verdict.where

    @property
    def state(self) -> State:
        """Return what the orchestrator has written down last."""
        if self._journal is None or self._journal.state is None:
            raise MigrationError(f"{self.orders.journal}: there is no journal")
        return self._journal.state

    async def source(self) -> Vm | None:
        """Return A's QEMU, connected to anew."""
        if self._a:
            await self._a.disconnect()
            self._a = None
        limit = self.state.plan.limits.connect
        where = monitor_a(self.state.plan, self._hosts[0])
        self._a = await connect_again("A's QEMU", where, limit=limit, command_limit=limit)
        return self._a

    async def destination(self, limit: float | None) -> OnB:
        """Ask B's QEMU."""
        plan = self.state.plan
        found = await look(monitor_b(plan, self._hosts[1]), limit or plan.limits.connect)
        return found if found is not OnB.NONE else await self.without_b(self._hosts[1], self.state)

    async def end_destination(self) -> None:
        """End B's QEMU."""
        await self._end(NAMES[Role.QEMU])

    async def clear(self) -> list[str]:
        """End what was started and remove what was made; return a phrase for each that is left."""
        left = []
        try:
            await self._end()
        except MigrationError as error:
            left.append(str(error))
        limit = self.state.plan.limits.command
        left += await remove_made(self._hosts[1], self.state, limit)
        left += await remove_exporter(self._hosts[0], self.state, limit)
        return left + await remove_channel(*self._hosts, self.state, limit)

    def enter(self, phase: Phase, *, cleared: bool = False) -> None:
        """Write it down; the way back does not depend on it."""
        assert self._journal is not None
        with suppress(OSError):
            self._journal.append(entered(self.state, phase, cleared=cleared))

    async def _keep_b(self, verdict: Verdict) -> str:
        """Let what carries the guest on B live on, and see that A's QEMU does not go on; return the line."""
        self.release_children()
        if not self.state.arrived:
            assert self._journal is not None
            with suppress(OSError):
                arrived = replace(self.state, phase=Phase.ARRIVED, arrived=time.time(), made=())
                self._journal.append(replace(arrived, disks=arrived.with_moved()))
        before, after = "A's QEMU is gone; ", ""
        needed = self.state.exporter and self.state.plan.through_qemu
        if self._a and self._a.connected and needed:
            # Until it is served from the files nobody else has what the guest needs.
            before, after = (
                "",
                "A's QEMU still serves its disk: do not end it, and never let its guest go on; ",
            )
        elif self._a and self._a.connected:
            before, after = "", "A's QEMU was ended; "
            with suppress(MigrationError):
                await self._a.execute("quit")
        await self._put_away()
        if verdict.facts.b in (OnB.NONE, OnB.STOPPED):
            return f"{before}{verdict.where}"
        unfinished = f"its disk is not complete yet; to complete it: {self.state.finish}"
        return f"{before}the guest runs on B; {after}{unfinished}"

    async def _put_away(self) -> None:
        """Put A's images out of reach; what fails, or who has them open, whoever goes on sees to."""
        state, limit = self.state, self.state.plan.limits.command
        with suppress(MigrationError):
            await put_away(self._hosts[0], state.name, Standing.NEEDED, state.departures, limit)

    def _nobody_knows(self, why: str) -> MigrationError:
        """Let everything live on; the line that says so, to be raised."""
        unknown = why if why.startswith(UNKNOWN) else f"{UNKNOWN}: {why}"
        ended = "nothing was ended" if self.children else "what was started was told to end"
        self.release_children()
        look = "look at query-migrate on A, then at query-status on B, before anything else"
        return MigrationError(f"{unknown}; {ended}; {look}{self._later()}")

    def _later(self) -> str:
        """Return what to type then, where the migration has a name that is known."""
        if self._journal is None or self._journal.state is None:
            return ""
        name = self._journal.state.name
        return f"; then: nbd-migrate resume {name}, or: nbd-migrate abort {name}"

    def release_children(self) -> None:
        """Let the children live on by themselves, unless they are owned."""
        if not self.orders.owned:
            for child in self.children:
                tell(child, "release")

    async def _end(self, name: str = "") -> None:
        """Stop those of this name, or all, the youngest first; MigrationError when one does not end."""
        children = [child for child in reversed(self.children) if name in ("", child.name)]
        for child in children:
            self.children.remove(child)
            tell(child, f"stop {GRACE:g}")
            os.close(child.words)
        ends = await asyncio.gather(*(ended(child) for child in children))
        stubborn = [child.name for child, end in zip(children, ends, strict=True) if not end]
        if stubborn:
            raise MigrationError(f"{' and '.join(stubborn)} did not end within {END:g} s")


def tell(child: Watched, word: str) -> None:
    """Give the child's supervisor, which may be dead, a word."""
    with suppress(BrokenPipeError):
        os.write(child.words, f"{word}\n".encode())


async def ended(child: Watched) -> bool:
    """Wait for a child's end; False when it does not end in time.

    Where its supervisor is dead, or was stopped (SIGSTOP) and ends nothing, the child is killed.
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
