"""A QEMU's devices and block jobs, of which none may come or go while its guest is on its way to another.

What it was not given at its start is in B's command line only by luck: B's QEMU is started as A's was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from recipes.errors import MigrationError
from recipes.qemu.vm import Vm

PLACES = ("/machine/peripheral", "/machine/peripheral-anon")
"""Where QEMU keeps what -device and device_add have made, with a name or without."""

_OVER = ("concluded", "null")
"""States of a job that does nothing any more."""


async def devices_of(vm: Vm) -> tuple[str, ...]:
    """Return the devices that can come and go, by name and kind, in order."""
    found = []
    for listed in await asyncio.gather(*(vm.execute("qom-list", path=place) for place in PLACES)):
        for each in listed:
            if each["type"].startswith("child<"):
                found.append(f"{each['name']} ({each['type'][len('child<') : -1]})")
    return tuple(sorted(found))


def difference(before: Sequence[str], now: Sequence[str]) -> str:
    """Return what has come and gone, as a phrase; empty where nothing has."""
    come, gone = sorted({*now} - {*before}), sorted({*before} - {*now})
    told = [f"{', '.join(each)} {verb}" for each, verb in ((come, "has come"), (gone, "has gone")) if each]
    return " and ".join(told)


async def check_jobs(vm: Vm) -> None:
    """Raise MigrationError where a job of somebody's is at work, as a mirror or a backup."""
    jobs = [each for each in await vm.execute("query-jobs") if each["status"] not in _OVER]
    if jobs:
        names = ", ".join(f"{each['id']} ({each['type']})" for each in jobs)
        raise MigrationError(
            f"a job is at work in {vm.name}: {names}; wait until it has ended, or cancel it (job-cancel), "
            "and run again"
        )
