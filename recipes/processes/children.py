"""The processes that a migration starts, and whose life they share; see recipes/processes/child.py."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from recipes.errors import MigrationError
from recipes.hosts.calls import cannot_start
from recipes.hosts.host import Host
from recipes.hosts.interruption import completed
from recipes.hosts.messages import Beginning
from recipes.hosts.spawn import spawn
from recipes.processes.child import COMMAND, KILL, LOOK, RELEASE, Child, Lifeline, give_up

__all__ = ["Child", "Children"]

SUPERVISOR_START = 60.0
"""Seconds until a supervisor must have said that its process runs, or why it does not."""

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
        for child in self._children:
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
        beginning = Beginning(host, host.own("supervisor", str(log), str(ready or ""), *argv))
        words_out, words_in = os.pipe()
        messages_out, messages_in = os.pipe()
        lifeline = Lifeline(name, words_in, messages_out)
        share(lifeline)
        if released:
            os.write(words_in, RELEASE)

        async def abandon(supervisor: asyncio.subprocess.Process) -> None:
            os.write(words_in, STOP)
            await give_up(supervisor)

        where = name if name.endswith(f" on {host.name}") else f"{name} on {host.name}"
        with tempfile.TemporaryFile() as errors:
            try:
                supervisor = await spawn(
                    beginning.argv(),
                    abandon=abandon,
                    stdin=words_out,
                    stdout=messages_in,
                    stderr=errors,
                    start_new_session=True,
                )
            except BaseException as error:
                os.close(words_in)
                os.close(messages_out)
                if isinstance(error, OSError):
                    raise cannot_start(host, where, error) from error
                raise
            finally:
                os.close(words_out)
                os.close(messages_in)
            messages = await stream(messages_out)
            try:
                said: dict[str, Any] = {}
                with suppress(TimeoutError):
                    async with asyncio.timeout(SUPERVISOR_START):
                        said = await beginning.first(messages)
                if "started" not in said:
                    why = said.get("failed") or await beginning.failure(supervisor, content(errors.fileno()))
                    raise MigrationError(f"{where} cannot be started: {why}")
            except BaseException:
                # Others may share its life.
                with suppress(BrokenPipeError):
                    os.write(words_in, STOP)
                os.close(words_in)
                await completed(give_up(supervisor))
                raise
        child = Child(
            *(name, host, said["started"], lifeline, supervisor),
            # Of what has no such file the last word is an image, or a monitor's address.
            mark=str(ready or argv[-1]),
            ready=ready,
            released=released,
        )
        return self._follow(child, messages)

    async def adopt(self, name: str, host: Host, pid_file: Path) -> Child | None:
        """The process of this name that an earlier run has started and released; None if it lives no more.

        Its command line must name its pid file: an id alone may be anybody's. Raises MigrationError when the
        host does not say.
        """
        found = await host.run("sh", "-c", _FIND, "sh", str(pid_file), limit=COMMAND)
        if not found.strip():
            return None
        return self._follow(Child(name, host, int(found), mark=str(pid_file), released=True))

    async def adopt_process(self, name: str, host: Host, pid: int, mark: str) -> Child | None:
        """The same, of a process whose id and mark were written down."""
        found = await host.run("sh", "-c", LOOK, "sh", str(pid), mark, limit=COMMAND)
        if found.strip() != "lives":
            return None
        return self._follow(Child(name, host, pid, mark=mark, released=True))

    def _follow(self, child: Child, messages: asyncio.StreamReader | None = None) -> Child:
        self._children.append(child)
        self._followers.append(asyncio.create_task(child.follow(messages)))
        return child


async def stream(fd: int) -> asyncio.StreamReader:
    """A reader for the end of a pipe, which it owns."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(fd, "rb", 0))
    return reader


def content(fd: int) -> str:
    """What is in an open file, up to 64 KiB."""
    return os.pread(fd, 1 << 16, 0).decode(errors="replace")
