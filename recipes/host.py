"""A host of the migration: how a command gets there, and where our own tools are on it."""

from __future__ import annotations

import asyncio
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdserve.errors import MigrationError


@dataclass(frozen=True)
class Host:
    """Where commands run.

    name   "A" or "B", as messages call it
    shell  prefix of every command: nothing for this host, ``ip netns exec NAME``, ``ssh HOST`` ...
    bin    directory of nbdserve, nbd-overlay and nbd-migrate there, or nothing
    """

    name: str
    shell: tuple[str, ...] = ()
    bin: str = ""

    @property
    def remote(self) -> bool:
        """Whether the prefix is ssh: a shell reads the words there, and our tools must be installed there."""
        return bool(self.shell) and Path(self.shell[0]).name == "ssh"

    def argv(self, command: Sequence[str]) -> list[str]:
        """The command with the prefix, quoted where a remote shell would split it again."""
        if self.remote:
            return [*self.shell, shlex.join(command)]
        return [*self.shell, *command]

    def tool(self, name: str) -> str:
        """How to call one of our own commands on this host."""
        if self.bin:
            return f"{self.bin}/{name}"
        beside = Path(sys.executable).with_name(name)
        return str(beside) if beside.exists() and not self.remote else name

    def own(self, name: str, *arguments: str) -> list[str]:
        """One of the small programs of this package (keeper, fence, probe) as a command of this host."""
        if self.remote:
            return [self.tool("nbd-migrate"), name, *arguments]
        return module(name, *arguments)

    async def run(self, *command: str, limit: float) -> str:
        """Run a short command there and return what it printed.

        Raises MigrationError with its last line when it fails, cannot be started, or takes longer than
        ``limit`` seconds; then it is killed.
        """
        what = f"{command[0]} on {self.name}"
        try:
            process = await asyncio.create_subprocess_exec(
                *self.argv(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise MigrationError(f"{what}: {error.strerror}") from error
        try:
            async with asyncio.timeout(limit):
                output, errors = await process.communicate()
        except BaseException as error:
            if process.returncode is None:
                process.kill()
                await process.wait()
            if isinstance(error, TimeoutError):
                raise MigrationError(f"{what}: no end within {limit:g} s") from error
            raise
        if process.returncode:
            lines = errors.decode(errors="replace").strip().splitlines()
            raise MigrationError(f"{what}: {lines[-1] if lines else f'exit code {process.returncode}'}")
        return output.decode(errors="replace")

    async def has(self, command: str, limit: float) -> bool:
        """Whether a command of this name can be run there."""
        if not self.shell:
            return shutil.which(command) is not None
        try:
            await self.run("sh", "-c", 'command -v "$1"', "sh", command, limit=limit)
        except MigrationError:
            return False
        return True

    async def test(self, question: str, path: str, limit: float) -> bool:
        """Answer one of test(1)'s questions about a path there, such as ``-e``; raises as run() does."""
        script = 'if test "$1" "$2"; then echo yes; else echo no; fi'
        return (await self.run("sh", "-c", script, "sh", question, path, limit=limit)).strip() == "yes"


def module(name: str, *arguments: str) -> list[str]:
    """One of this package's modules as a command of this host."""
    # -P: otherwise Python would take modules from the working directory first, whoever has put them there.
    return [sys.executable, "-P", "-m", f"recipes.{name}", *arguments]
