"""B's QEMU as a plan has it started: its program, behind a prefix such as sudo, and its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from nbdserve.common.errors import UsageError
from recipes.discovery.command_line.options import CommandLine, parse


@dataclass(frozen=True)
class Started:
    """How B's QEMU is started.

    program  all words before its first option; empty where no QEMU is among them
    command  its options; None where these are not understood here, as somebody else has written them
    """

    program: tuple[str, ...]
    command: CommandLine | None


def started(words: Sequence[str]) -> Started:
    """Take ``destination.qemu`` apart."""
    at = next((n for n, word in enumerate(words) if _is_qemu(word)), None)
    if at is None:
        return Started((), None)
    try:
        command: CommandLine | None = parse(words[at:])
    except UsageError:
        command = None
    return Started(tuple(words[: at + 1]), command)


def _is_qemu(word: str) -> bool:
    name = PurePath(word).name
    return name.startswith("qemu") or name == "kvm"
