"""One short command on a host: what it printed, told apart from what is said on the way, in a limited time.

Behind a prefix (ssh, sudo ...) a shell runs the command between two marks on its standard output. What comes
before the first is a login's greeting; where there is none, the prefix has failed and not the command.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from collections.abc import Awaitable, Sequence
from contextlib import suppress

from recipes.errors import MigrationError
from recipes.hosts.process_group import KILL, end_group
from recipes.hosts.spawn import spawn
from recipes.hosts.ssh import explain
from recipes.hosts.way import Way

MISSING = (126, 127)
"""A shell's exit codes for a command that cannot be run, or is not there."""

MOST = 1 << 24
"""Bytes of an output that are kept: no command that is run so has as much to say."""

REST = 1.0
"""Seconds in which the rest of the output must come once a command has ended: a shared ssh may hold it open
for hours."""

_FRAME = (
    "read -r a b c d group e < /proc/$$/stat; "
    'echo; echo "$0 $group"; echo >&2; echo "$0" >&2; '
    '"$@"; code=$?; echo; echo "$0 $code"; exit $code'
)
"""Runs the command "$@" between lines with the mark "$0": its process group before, its exit code behind."""


class HostError(MigrationError):
    """There is no way to a host; the message says what was said on it, and what can be done."""


def unreachable(way: Way, said: str, otherwise: str) -> HostError:
    """Return the error that the prefix of this host has failed with these words, or without any."""
    why = explain(said, way.shell) or otherwise
    return HostError(f"there is no way to {way.name} by '{shlex.join(way.shell)}': {why}")


class Call:
    """A command that runs on a host, for one run()."""

    def __init__(self, way: Way, command: Sequence[str], given: str | Awaitable[str] = "") -> None:
        """``given`` is what the command reads from its standard input, perhaps only later."""
        self._way = way
        self._command = command
        self._given = given
        self._what = f"{command[0]} on {way.name}"
        self._mark = os.urandom(8).hex()
        self._output = bytearray()
        self._errors = bytearray()

    async def run(self, limit: float) -> str:
        """Run it and return what it printed.

        Raises HostError where the host cannot be reached, MigrationError with the command's last line when it
        fails, cannot be started, or takes longer than ``limit`` seconds; then it is killed.
        """
        framed = ["sh", "-c", _FRAME, self._mark, *self._command] if self._way.shell else self._command
        try:
            process = await spawn(
                self._way.argv(framed),
                stdin=asyncio.subprocess.PIPE if self._given else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise cannot_start(self._way, self._what, error) from error
        readers = [
            asyncio.create_task(_collect(stream, into))
            for stream, into in ((process.stdout, self._output), (process.stderr, self._errors))
        ]
        readers.append(asyncio.create_task(_give(process.stdin, self._given)))
        try:
            async with asyncio.timeout(limit):
                code = await process.wait()
            await asyncio.wait(readers, timeout=REST)
        except BaseException as error:
            await self._end(process)
            if isinstance(error, TimeoutError):
                raise self._late(limit) from error
            raise
        finally:
            for reader in readers:
                reader.cancel()
        return self._judge(code)

    def _judge(self, code: int) -> str:
        """Return the output of a command that has ended, or MigrationError that says why there is none."""
        output, errors = self._output.decode(errors="replace"), self._errors.decode(errors="replace")
        if self._way.shell:
            begun = self._begun()
            if begun is None:
                # What keeps somebody out may say so on either output, as nologin(8) does.
                said = errors if errors.strip() else output
                raise unreachable(self._way, said, f"it ended with code {code}")
            output = output[begun.end() :]
            end = re.search(rf"\r?\n{self._mark} ([0-9]+)\r?\n", output)
            if end is None:
                raise unreachable(self._way, errors.rpartition(self._mark)[2], f"{self._what} was cut off")
            output, code = output[: end.start()], int(end[1])
            errors = errors.rpartition(self._mark)[2]
            if code in MISSING:
                raise MigrationError(f"there is no {self._command[0]} on {self._way.name}; install it there")
        if code:
            lines = errors.strip().splitlines()
            raise MigrationError(f"{self._what}: {lines[-1].strip() if lines else f'exit code {code}'}")
        return output

    def _begun(self) -> re.Match[str] | None:
        """Return where the first mark is in the output, with the command's process group."""
        return re.search(rf"\n{self._mark} ?([0-9]*)\r?\n", self._output.decode(errors="replace"))

    def _late(self, limit: float) -> MigrationError:
        if self._way.shell and self._begun() is None:
            said = self._errors.decode(errors="replace")
            return unreachable(self._way, said, f"no answer within {limit:g} s")
        return MigrationError(f"{self._what}: no end within {limit:g} s")

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """End a command before its time, with all that it has started, as far as that can be done."""
        await end_group(process)
        begun = self._begun() if self._way.shell else None
        if begun is None or not begun[1] or (process.returncode is not None and not self._way.remote):
            return
        # What runs elsewhere does not end with the way there, and what is somebody else's cannot be killed.
        with suppress(MigrationError):
            await Call(self._way, ["kill", "-KILL", f"-{begun[1]}"]).run(KILL)
        await end_group(process)


def cannot_start(way: Way, what: str, error: OSError) -> MigrationError:
    """Return the error that the first word of a command line is no program of this host."""
    # Not for want of that program, where no file is named: too many are open, or there is no memory.
    reason = f"{what}: {error.filename}: {error.strerror}" if error.filename else f"{what}: {error.strerror}"
    if not error.filename:
        return MigrationError(reason)
    return HostError(f"{reason}; install that on this host") if way.shell else MigrationError(reason)


async def _give(stream: asyncio.StreamWriter | None, given: str | Awaitable[str]) -> None:
    if stream:
        data = given.encode() if isinstance(given, str) else (await given).encode()
        # Who has ended reads nothing more; its exit code says why.
        with suppress(ConnectionError):
            stream.write(data)
            await stream.drain()
        stream.close()


async def _collect(stream: asyncio.StreamReader | None, into: bytearray) -> None:
    assert stream
    while data := await stream.read(1 << 16):
        # What says more than that has no end; so its end mark is missing.
        if len(into) < MOST:
            into += data
