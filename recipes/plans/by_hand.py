"""What an operator types to speak with one of the two QEMUs, wherever its monitor is."""

from __future__ import annotations

import shlex

from recipes.connections.address import ssh_words
from recipes.hosts.quoting import pasted
from recipes.plans.plan import Destination, Source


def asking(there: Source | Destination, *words: str) -> str:
    """Return the command that has a QEMU execute a command of QMP."""
    return on_host(there, ["nbd-migrate", "qmp", there.qmp, *words])


def cancelling(source: Source) -> str:
    """Return the command that lets a guest run on that stands still before the switch-over."""
    return asking(source, "migrate_cancel")


def on_host(there: Source | Destination, words: list[str]) -> str:
    """Return a command of ours for a monitor as it is typed here: over ssh, where its host has an address."""
    if not there.host:
        return pasted(words)
    if there.bin:
        words = [f"{there.bin}/{words[0]}", *words[1:]]
    return pasted(["ssh", *ssh_words(there.host), shlex.join(words)])
