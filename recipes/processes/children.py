"""The processes that a migration starts, and whose life they share; see recipes/processes/child.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.interruption import completed
from recipes.processes.child import COMMAND, KILL, RELEASE, SUPERVISOR_ANSWER, Child, Lifeline, lives
from recipes.processes.speaking import SilentError, speak

__all__ = ["Child", "Children"]

STOP = f"stop {KILL:g}\n".encode()
"""What a supervisor is told that is given up."""

_FIND = (
    'pid=$(cat "$1" 2>/dev/null); case "$pid" in ""|*[!0-9]*) exit 0;; esac; '
    'if grep -qs "^State:.[^XZ]" "/proc/$pid/status" && grep -qzF -- "$1" "/proc/$pid/cmdline"; '
    "then echo $pid; fi"
)
"""Prints the process id in the file $1, if that is a living process whose command line names the file."""


class Children:
    """Every process that was started, in order.

    async with Children() as children:      # what is started here ends with this block, or with this process
        child = await children.start("QEMU on B", host, Path("qemu.log"), ["qemu-system-x86_64", ...])
    """

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._followers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop every child that was not released, the youngest first, and let go of the others."""
        # In a task of its own: in one that was cancelled, Python 3.11 takes no time limit for what it is.
        await completed(self._end())

    async def _end(self) -> None:
        for child in reversed(self._children):
            if child.running and not child.released:
                with suppress(MigrationError):
                    await child.stop(KILL)
        for follower in self._followers:
            follower.cancel()
        await asyncio.gather(*self._followers, return_exceptions=True)
        for number, child in enumerate(self._children):
            # One that was started in its place has these names now.
            if not any(each.log == child.log for each in self._children[number + 1 :] if child.log):
                await child.tidy()
            await child.close()

    async def start(
        self,
        name: str,
        host: Host,
        log: Path,
        argv: Sequence[str],
        *,
        ready: Path | None = None,
        released: bool = False,
        share: Callable[[Lifeline], None] = lambda lifeline: None,
    ) -> Child:
        """Start a process on a host, its output appended to ``log`` there.

        ``ready`` is the file that it makes when it is ready, see Child.ready(). With ``released`` it lives on
        when we end, from its beginning. ``share`` is given the lifeline before there is a process. Raises
        MigrationError when it cannot be started.
        """
        where = name if name.endswith(f" on {host.name}") else f"{name} on {host.name}"
        try:
            speaking = await speak(
                *(where, host, host.own("supervisor", str(log), str(ready or ""), *argv)),
                name=name,
                first=RELEASE if released else b"",
                last=STOP,
                share=share,
            )
        except SilentError as error:
            raise MigrationError(f"{where} cannot be started: {error}") from error
        child = Child(
            *(name, host, speaking.pid, speaking.lifeline, speaking.process),
            # Of what has no such file the last word is an image, or a monitor's address.
            mark=str(ready or argv[-1]),
            log=log,
            ready=ready,
            released=released,
        )
        return self._follow(child, speaking.messages)

    async def adopt(self, name: str, host: Host, pid_file: Path, limit: float = COMMAND) -> Child | None:
        """Return the process of this name that an earlier run has started and released.

        It is None if the process lives no more.

        Its command line must name its pid file: an id alone may be anybody's. Raises MigrationError when the
        host does not say within ``limit`` seconds.
        """
        found = await host.run("sh", "-c", _FIND, "sh", str(pid_file), limit=limit)
        if not found.strip():
            return None
        child = await self._adopted(name, host, int(found), str(pid_file), pid_file.with_suffix(".log"))
        child.has_its_file()
        return child

    async def adopt_process(
        self, name: str, host: Host, pid: int, mark: str, log: Path, limit: float = COMMAND
    ) -> Child | None:
        """Return the same, of a process whose id and mark were written down."""
        if not await lives(host, pid, mark, limit):
            return None
        return await self._adopted(name, host, pid, mark, log)

    async def _adopted(self, name: str, host: Host, pid: int, mark: str, log: Path) -> Child:
        """Become the holder of a process; where its supervisor is there no more, it is watched without."""
        try:
            speaking = await speak(
                name, host, host.own("attach", str(log)), name=name, limit=SUPERVISOR_ANSWER
            )
        except MigrationError:
            speaking = None
        if speaking and speaking.pid != pid:
            await speaking.end()
            speaking = None
        held = (speaking.lifeline, speaking.process) if speaking else ()
        child = Child(name, host, pid, *held, mark=mark, released=True, adopted=True)
        return self._follow(child, speaking.messages if speaking else None)

    def _follow(self, child: Child, messages: asyncio.StreamReader | None = None) -> Child:
        self._children.append(child)
        self._followers.append(asyncio.create_task(child.follow(messages)))
        return child
