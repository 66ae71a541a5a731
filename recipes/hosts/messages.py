"""What a supervisor says on its standard output, told apart from what is said on the way to it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from typing import Any, Protocol

from recipes.hosts.calls import MISSING
from recipes.hosts.ssh import explain
from recipes.hosts.way import Way

END = 1.0
"""Seconds in which a supervisor that says nothing more has ended."""

_FRAME = 'echo; echo "$0"; exec "$@"'
"""Becomes the command "$@" behind a line with the mark "$0"."""


class Lines(Protocol):
    """What is read line by line, as an asyncio.StreamReader; an empty line is the end."""

    async def readline(self) -> bytes:
        """Return the next line with its end."""


class Beginning:
    """The beginning of a supervisor behind a prefix: a login may greet first, up to a mark."""

    def __init__(self, way: Way, supervisor: Sequence[str]) -> None:
        self._way = way
        self._supervisor = supervisor
        self._mark = os.urandom(8).hex()
        self._greeted = not way.shell
        self._greeting = ""

    @property
    def arrived(self) -> bool:
        """Tell whether the host was reached, as far as it has been read."""
        return self._greeted

    def argv(self) -> list[str]:
        """Return the supervisor's command line, with the prefix."""
        framed = ["sh", "-c", _FRAME, self._mark, *self._supervisor] if self._way.shell else self._supervisor
        return self._way.argv(framed)

    async def first(self, messages: Lines) -> dict[str, Any]:
        """Return the first message; an empty one when there is none."""
        while line := await messages.readline():
            if self._greeted and (message := message_in(line)):
                return message
            self._greeted = self._greeted or self._mark.encode() in line
            if not self._greeted:
                self._greeting = line.decode(errors="replace")
        return {}

    async def failure(self, process: asyncio.subprocess.Process, said: str) -> str:
        """Return why there was no message; ``said`` is what the supervisor, or its prefix, wrote as
        errors.
        """
        try:
            async with asyncio.timeout(END):
                code = await process.wait()
        except TimeoutError:
            code = 0
        if not self._greeted:
            otherwise = f"{self._way.shell[0]} ended with code {code}" if code else "no answer in time"
            return explain(said if said.strip() else self._greeting, self._way.shell) or otherwise
        if code in MISSING:
            return f"there is no {self._supervisor[0]} on {self._way.name}; install it there"
        lines = said.strip().splitlines()
        return lines[-1].strip() if lines else "its supervisor ended without a word"


def message_in(line: bytes) -> dict[str, Any]:
    """Return the message on a line; an empty one where something else is on it."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
