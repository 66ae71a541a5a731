"""A connection to a supervisor: the pipes to its standard input and output, on whatever host it is."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from recipes.errors import MigrationError
from recipes.hosts.calls import cannot_start
from recipes.hosts.host import Host
from recipes.hosts.interruption import completed
from recipes.hosts.messages import Beginning
from recipes.hosts.spawn import spawn
from recipes.processes.child import Lifeline, give_up

SUPERVISOR_START = 60.0
"""Seconds until a supervisor must have said that its process runs, or why it does not."""


class SilentError(MigrationError):
    """There is no supervisor, or it has no process; the message is why."""


@dataclass(frozen=True)
class Speaking:
    """A supervisor that has said that its process runs.

    pid       of the process
    lifeline  our ends of the pipes
    process   the supervisor, or what leads to it
    messages  what it says next
    """

    pid: int
    lifeline: Lifeline
    process: asyncio.subprocess.Process
    messages: asyncio.StreamReader

    async def end(self) -> None:
        """Let go of it."""
        os.close(self.lifeline.words)
        await completed(give_up(self.process))


async def speak(
    where: str,
    host: Host,
    command: Sequence[str],
    *,
    name: str,
    first: bytes = b"",
    last: bytes = b"",
    limit: float = SUPERVISOR_START,
    share: Callable[[Lifeline], None] = lambda lifeline: None,
) -> Speaking:
    """Start a command that is a supervisor, or leads to one, and wait for its first message.

    ``first`` is what it is told at once, and ``last`` when it is given up; ``share`` is given the lifeline
    before there is a process, so that others may share its life. Raises SilentError, and MigrationError when
    the command cannot be started; ``where`` says what and where that is.
    """
    beginning = Beginning(host, command)
    words_out, words_in = os.pipe()
    messages_out, messages_in = os.pipe()
    lifeline = Lifeline(name, words_in, messages_out)
    share(lifeline)
    os.write(words_in, first)

    async def abandon(process: asyncio.subprocess.Process) -> None:
        with suppress(BrokenPipeError):
            os.write(words_in, last)
        await give_up(process)

    with tempfile.TemporaryFile() as errors:
        try:
            process = await spawn(
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
                async with asyncio.timeout(limit):
                    said = await beginning.first(messages)
            if "started" not in said:
                why = said.get("failed") or await beginning.failure(process, content(errors.fileno()))
                raise SilentError(why)
        except BaseException:
            # Others may share its life.
            with suppress(BrokenPipeError):
                os.write(words_in, last)
            os.close(words_in)
            await completed(give_up(process))
            raise
    return Speaking(said["started"], lifeline, process, messages)


async def stream(fd: int) -> asyncio.StreamReader:
    """Return a reader for the end of a pipe, which it owns."""
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(fd, "rb", 0))
    return reader


def content(fd: int) -> str:
    """Return what is in an open file, up to 64 KiB."""
    return os.pread(fd, 1 << 16, 0).decode(errors="replace")
