"""Hosts and a QEMU that answer what they were told to."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes.hosts.host import Host
from recipes.qemu.vm import EndedVm


@dataclass(frozen=True)
class Told(Host):
    """A host where a command prints what stands here beside some of its words, and a path may be there."""

    answers: Mapping[str, str] = field(default_factory=dict)
    paths: frozenset[str] = frozenset()

    async def run(self, *command: str, limit: float, given: str | Awaitable[str] = "") -> str:
        """What the first entry that fits says."""
        line = " ".join(command)
        return next(answer for words, answer in self.answers.items() if words in line)

    async def tests(self, asked: Sequence[tuple[str, str]], limit: float) -> list[bool]:
        """Whether each path is there."""
        return [path in self.paths for _, path in asked]


class ToldVm(EndedVm):
    """A QEMU that answers commands with what it was told to."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        super().__init__("A's QEMU")
        self.answers = answers

    async def call(self, command: str, given: Mapping[str, object], *, limit: float | None = None) -> Any:
        """The answer to this command, whatever is given."""
        return self.answers[command]
