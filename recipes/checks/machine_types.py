"""Whether B's QEMU can be the machine that A's is."""

from __future__ import annotations

import re

from recipes.checks.started import Started
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.qemu.machine import machine_of
from recipes.qemu.vm import Vm

_VERSION = re.compile(r"version (\d+)\.(\d+)(?:\.(\d+))?")


async def check_qemu(a: Vm, host_b: Host, started: Started, limit: float) -> list[str]:
    """Compare A's QEMU with B's, where that is known; return what may go wrong.

    Raises MigrationError where B's does not know the type of A's machine.
    """
    if not started.program:
        return []
    said = await host_b.run(*started.program, "--version", limit=limit)
    here = (await a.execute("query-version"))["qemu"]
    version = (here["major"], here["minor"])
    match = _VERSION.search(said)
    there = (int(match[1]), int(match[2])) if match else version
    kind = (await machine_of(a)).type
    known = await host_b.run(*started.program, "-machine", "help", limit=limit)
    if kind and kind not in {line.split(" ")[0] for line in known.splitlines()}:
        raise MigrationError(
            f"destination.qemu: {started.program[-1]} on B (QEMU {_text(there)}) does not know the machine "
            f"type {kind} of A's (QEMU {_text(version)}); install a newer one there"
        )
    if there >= version:
        return []
    return [
        f"B's QEMU {_text(there)} is older than A's {_text(version)}; where it cannot load the guest, that "
        "runs on on A"
    ]


def _text(version: tuple[int, int]) -> str:
    return ".".join(str(number) for number in version)
