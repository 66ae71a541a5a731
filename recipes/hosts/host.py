"""A host of the migration: what runs there, and where our own tools are on it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.errors import MigrationError
from recipes.hosts import ssh
from recipes.hosts.calls import Call
from recipes.hosts.way import Way

PROGRAMS = {
    "supervisor": "recipes.processes.supervisor",
    "attach": "recipes.processes.attach",
    "bridge": "recipes.connections.bridge",
    "listen": "recipes.connections.listen",
    "take": "recipes.connections.take",
    "tunnel": "recipes.connections.tunnel",
    "fence": "recipes.fencing.fence",
    "put-away": "recipes.fencing.moving",
    "give-back": "recipes.fencing.giving_back",
    "marks": "recipes.fencing.marks",
    "guard": "recipes.migrate.guard",
    "probe": "recipes.cli.probe",
    "process": "recipes.discovery.process",
    "reach": "recipes.checks.reach",
    "route": "recipes.discovery.route",
}
"""The small programs, by the words that call them, and the modules that they are."""

_SHOWN = 60
"""Characters that are shown of an answer that is not understood."""


@dataclass(frozen=True)
class Host(Way):
    """Where commands run, and a way there.

    bin      the directory of our own commands there, or nothing
    address  ``ssh://...``: its monitors are reached over this way, too; otherwise they are where we run
    control  the directory of the sockets by which a connection to it is shared, or nothing
    """

    bin: str = ""
    address: str = ""
    control: str = ""

    async def prepared(self, limit: float) -> Host:
        """Return the same host, whose ssh asks nothing and waits at most ``limit`` seconds for a
        connection.
        """
        return dataclasses.replace(self, options=await ssh.missing_options(self.shell, limit))

    def tool(self, name: str) -> str:
        """Return how to call one of our own commands on this host."""
        if self.bin:
            return f"{self.bin}/{name}"
        beside = Path(sys.executable).with_name(name)
        return str(beside) if beside.exists() and not self.remote else name

    def own(self, name: str, *arguments: str) -> list[str]:
        """Return one of the small programs of this package, as the supervisor, as a command of this host."""
        if self.remote:
            return [self.tool("nbd-migrate"), name, *arguments]
        return module(name, *arguments)

    async def run(self, *command: str, limit: float, given: str | Awaitable[str] = "") -> str:
        """Run a short command there and return what it printed; ``given`` is its standard input, perhaps
        only later.

        Raises HostError where the host cannot be reached, MigrationError with the command's last line when it
        fails, cannot be started, or takes longer than ``limit`` seconds; then it is killed.
        """
        return await Call(self, command, given).run(limit)

    async def told(self, *command: str, limit: float) -> dict[str, Any]:
        """Run a short command there that prints a JSON object, and return that.

        Raises as run(), and MigrationError for another answer: it may be of another version than ours.
        """
        answer = await self.run(*command, limit=limit)
        try:
            told = json.loads(answer)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            said = " ".join(answer.split())[:_SHOWN]
            raise MigrationError(
                f"{command[0]} on {self.name} gives an answer that is not understood, {said!r}; see which "
                "version of it is there"
            )
        return told

    async def has(self, command: str, limit: float) -> bool:
        """Tell whether a command of this name can be run there; raises as run() does."""
        return not await self.lacking([command], limit)

    async def lacking(self, commands: Sequence[str], limit: float) -> list[str]:
        """Return those of several that cannot be run there, asked for at once; raises as run() does."""
        if not self.shell:
            return [each for each in commands if shutil.which(each) is None]
        return (await self.run("sh", "-c", _LACKING, "sh", *commands, limit=limit)).splitlines()

    async def test(self, question: str, path: str, limit: float) -> bool:
        """Answer one of test(1)'s questions about a path there, such as ``-e``; raises as run() does."""
        [answer] = await self.tests([(question, path)], limit)
        return answer

    async def tests(self, asked: Sequence[tuple[str, str]], limit: float) -> list[bool]:
        """Answer several of them, each about its path, in one command there."""
        words = [word for pair in asked for word in pair]
        said = await self.run("sh", "-c", _TEST, "sh", *words, limit=limit)
        return [each == "yes" for each in said.split()]


_LACKING = 'for p; do command -v "$p" >/dev/null || printf "%s\\n" "$p"; done'
_TEST = 'while test $# -gt 0; do if test "$1" "$2"; then echo yes; else echo no; fi; shift 2; done'


def module(name: str, *arguments: str) -> list[str]:
    """Return one of the small programs of this package as a command of this host."""
    # -P: otherwise Python would take modules from the working directory first, whoever has put them there.
    return [sys.executable, "-P", "-m", PROGRAMS[name], *arguments]
