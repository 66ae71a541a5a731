"""What B's QEMU is to do later it tries before; how it is to open a disk is not worth a migration."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from recipes.errors import MigrationError
from recipes.plans.disks import PlannedDisk
from recipes.plans.limits import Limits
from recipes.plans.plan import Destination, Export, Plan, Source
from recipes.qemu.vm import CommandError
from recipes.steps.rights import check_rights


class Refusing:
    """A QEMU that refuses nodes which have, or lack, a key."""

    def __init__(self, key: str) -> None:
        self._key = key
        self.opened: list[Mapping[str, object]] = []

    async def call(self, command: str, given: Mapping[str, object]) -> None:
        """Open it, or not."""
        if self._key in given:
            raise CommandError("refused", "filesystem does not support O_DIRECT")
        self.opened.append(given)

    async def execute(self, command: str, **given: object) -> None:
        """Close it again."""


def tried(key: str) -> tuple[Refusing, list[str]]:
    """The QEMU that refuses what has this key, and what the operator is told."""
    disk = PlannedDisk("/a.raw", "/b.raw", "disk0", cache=("direct",), aio="native")
    plan = Plan(
        Source(qmp="/a.qmp"),
        Export(uri="nbd://127.0.0.1/vm"),
        Destination(qemu=("qemu",), qmp="/b.qmp", migration="unix:/m"),
        limits=Limits(),
        disk=(disk,),
    )
    told: list[str] = []
    qemu = Refusing(key)
    m = SimpleNamespace(
        plan=plan,
        disks=plan.disks,
        monitor_b=qemu,
        report=SimpleNamespace(note=told.append),
        qemu=None,
        unattended=False,
    )
    asyncio.run(check_rights(cast(Any, m)))
    return qemu, told


def test_a_disk_is_used_without_what_qemu_cannot_do_there_and_that_is_told() -> None:
    qemu, told = tried("cache")
    assert told == [
        "B's QEMU cannot open /b.raw with cache.direct=on and aio=native (filesystem does not support "
        "O_DIRECT), and will use it without"
    ]
    assert [node["driver"] for node in qemu.opened] == ["nbd", "file"]
    qemu, told = tried("nothing")
    assert told == []
    assert qemu.opened[-1]["aio"] == "native"


def test_what_it_cannot_open_in_any_way_is_refused() -> None:
    with pytest.raises(MigrationError, match=r"will not be able to open /b.raw in the end: filesystem"):
        tried("filename")
