"""Calling the operator's commands, on the host where the migration runs.

Each gets the state as JSON on its standard input, and has a time limit. What it prints goes to a log in the
migration's directory, the first part of it. The journal says that a hook is called before it is, and that it
has ended when it has: who takes the migration up knows of one that was interrupted, and calls it again. So
none outlives a command that is killed.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

from recipes.errors import MigrationError
from recipes.hosts.interruption import undisturbed
from recipes.hosts.process_group import end_group
from recipes.hosts.quoting import pasted
from recipes.hosts.spawn import spawn
from recipes.migrate.journal import HOOKS_LOG
from recipes.migrate.runtime import Migration
from recipes.migrate.state import State
from recipes.plans.hooks import Hook
from recipes.processes.lastwords import last_words

KEPT = 256 << 10
"""Bytes of a hook's output that are kept; what comes beyond is read, and thrown away."""

MOST = 4 << 20
"""Bytes of a log at which it begins anew."""

REST = 1.0
"""Seconds in which the output must end once the command has: what that has left behind may hold it open."""


async def call(m: Migration, hook: Hook, reason: str = "") -> None:
    """Call a hook, if there is one, and it has not come to its end before; ``failed`` each time.

    Raises MigrationError with how it has failed.
    """
    command = m.plan.hooks.command(hook.value)
    begun, ended = m.state.hooks_begun, m.state.hooks_ended
    if not command or (hook in ended and hook is not Hook.FAILED):
        return
    if hook in begun and hook not in ended:
        m.report.note(f"hook {hook.value} was interrupted before, and is called again")
    m.record(hooks_begun=_with(begun, hook), hooks_ended=tuple(each for each in ended if each is not hook))
    try:
        await run(command, hook, m.state, m.journal.directory, reason)
    except asyncio.CancelledError:
        # Who takes this up calls it again.
        raise
    except MigrationError:
        m.record(hooks_ended=_with(m.state.hooks_ended, hook))
        raise
    m.record(hooks_ended=_with(m.state.hooks_ended, hook))


async def tell(m: Migration, hook: Hook, reason: str = "") -> None:
    """Call a hook whose failure is only told."""
    try:
        await call(m, hook, reason)
    except MigrationError as error:
        m.report.note(str(error))


@asynccontextmanager
async def beside(m: Migration, hook: Hook) -> AsyncIterator[None]:
    """Call a hook whose failure is only told while the caller goes on; wait for it in the end."""
    calling = asyncio.create_task(tell(m, hook))
    try:
        # It is given the state as it is now.
        await asyncio.sleep(0)
        yield
        await calling
    except MigrationError:
        await calling
        raise
    finally:
        calling.cancel()
        await asyncio.wait({calling})


@asynccontextmanager
async def told_of_failure(m: Migration) -> AsyncIterator[None]:
    """Call ``failed`` when what the caller does fails, or is interrupted."""
    try:
        yield
    except asyncio.CancelledError:
        await undisturbed(tell(m, Hook.FAILED, "interrupted"))
        raise
    except MigrationError as error:
        await tell(m, Hook.FAILED, str(error))
        raise


def _with(hooks: tuple[Hook, ...], hook: Hook) -> tuple[Hook, ...]:
    return hooks if hook in hooks else (*hooks, hook)


async def run(command: Sequence[str], hook: Hook, state: State, directory: Path, reason: str = "") -> None:
    """Run a hook's command; raises MigrationError with its last line where it fails or takes too long."""
    limit, log = state.plan.limits.hook, directory / HOOKS_LOG
    given = {**json.loads(state.to_json()), "hook": hook.value, "reason": reason}
    with tempfile.TemporaryFile() as file, _Output() as output, _Life() as life:
        # It may be read at any time, or by nobody.
        file.write(json.dumps(given).encode() + b"\n")
        file.seek(0)
        try:
            require_program(command[0])
            process = await spawn(
                ["sh", "-c", _BOUND, str(life.held), *command],
                stdin=file,
                stdout=output.end,
                stderr=output.end,
                pass_fds=[life.held],
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise MigrationError(f"hook {hook.value}: {pasted(command[:1])}: {why}") from error
        except asyncio.CancelledError:
            # It may have begun, and has been ended.
            output.write(log, f"{hook.value}: {pasted(command)}: was interrupted")
            raise
        output.read()
        how, code = "was interrupted", -1
        try:
            async with asyncio.timeout(limit):
                code = await process.wait()
            life.spare()
            how = f"ended with code {code}" if code >= 0 else f"was ended by signal {-code}"
            await output.rest(REST)
        except TimeoutError:
            how = f"has not ended within {limit:g} s (limits.hook), and was killed"
        finally:
            await end_group(process)
            output.write(log, f"{hook.value}: {pasted(command)}: {how}")
    if code:
        said = "".join(char if char.isprintable() else "?" for char in last_words(output.text))[-_LINE:]
        raise MigrationError(f"hook {hook.value} {how}{f': {said}' if said else ''}; its output is in {log}")


def require_program(name: str) -> None:
    """Raise OSError unless a command of this name can be run: a shell would say so less clearly."""
    if shutil.which(name) is None:
        number = errno.EACCES if os.path.exists(name) else errno.ENOENT
        raise OSError(number, os.strerror(number))


_BOUND = '( { read -r spared < "/proc/self/fd/$0" || kill -s KILL 0; } > /dev/null 2>&1 & ); exec "$@"'
"""Becomes the command "$@", whose session ends when nobody holds the other end of the pipe "$0" any more."""


class _Life:
    """A pipe whose end is ours as long as we live: a hook does not outlive a command that is killed."""

    def __init__(self) -> None:
        self.held, self._ours = os.pipe()

    def spare(self) -> None:
        """The command has ended; what it has left behind may live on."""
        with suppress(BrokenPipeError):
            os.write(self._ours, b"spared\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.held)
        os.close(self._ours)


class _Output:
    """What a hook prints, through a pipe: the first part, the end, and how much there was."""

    def __init__(self) -> None:
        self._first, self._last, self._bytes = bytearray(), b"", 0
        self._fd, self.end = os.pipe()
        self._ended = asyncio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
        self._leave()

    def read(self) -> None:
        """Read it all from now on, whatever there is; the end that is written to is the hook's alone."""
        self._leave()
        os.set_blocking(self._fd, False)
        asyncio.get_running_loop().add_reader(self._fd, self._readable)

    async def rest(self, seconds: float) -> None:
        """Wait for its end, for so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()

    @property
    def text(self) -> str:
        """Return the end of it."""
        return (bytes(self._first[-_END:]) + self._last)[-_END:].decode(errors="replace")

    def _leave(self) -> None:
        if self.end >= 0:
            os.close(self.end)
            self.end = -1

    def _readable(self) -> None:
        data = os.read(self._fd, 1 << 16)
        if not data:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._ended.set()
        self._bytes += len(data)
        room = KEPT - len(self._first)
        self._first += data[:room]
        self._last = (self._last + data[room:])[-_END:]

    def write(self, log: Path, heading: str) -> None:
        """Append it to a log, under a heading; never fails."""
        lost = self._bytes - len(self._first)
        more = f"\n... and {lost} bytes more\n" if lost else ""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with suppress(OSError):
            mode = "wb" if log.exists() and log.stat().st_size > MOST else "ab"
            with open(log, mode) as file:
                file.write(f"--- {stamp} {heading}\n".encode() + self._first + more.encode())
                if self._first and not self._first.endswith(b"\n") and not lost:
                    file.write(b"\n")


_LINE = 300
"""Characters of the last line that are told."""

_END = 4096
"""Bytes of the end of an output, in which its last line is looked for."""
