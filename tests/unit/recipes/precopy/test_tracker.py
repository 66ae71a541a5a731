"""What A's QEMU and the overlays are told of the last bitmap, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nbdserve.common.uri import NbdUri
from recipes.errors import MigrationError
from recipes.migrate.runtime import Migration
from recipes.precopy.tracker import Tracker
from recipes.qemu.vm import CommandError, Vm


class Monitor:
    """One that notes what it is told, in the order in which that comes, and refuses what it is to refuse."""

    def __init__(self, told: list[str], refuses: str = "") -> None:
        self._told, self._refuses = told, refuses

    async def call(self, command: str, given: Mapping[str, Any], *, limit: float = 0.0) -> Any:
        names = [str(each["data"]["node"]) for each in given.get("actions", [])]
        names += [str(given[key]) for key in ("id", "bitmap") if key in given]
        self._told.append(" ".join([command, *names]))
        await asyncio.sleep(0)
        if command == self._refuses:
            raise CommandError(f"no {command}", "no")
        return {"bytes": 1 << 16}

    async def execute(self, command: str, **given: object) -> Any:
        return await self.call(command, given)


def tracker(told: list[str], refuses: str = "") -> Tracker:
    """One that has two disks, and one bitmap more than the one that records."""

    async def during(work: Awaitable[Any], limit: float, what: str) -> Any:
        return await work

    disks = [SimpleNamespace(drive=name) for name in ("one", "two")]
    at = Monitor(told, refuses)
    plan = SimpleNamespace(
        limits=SimpleNamespace(command=60.0),
        disk_over_tls=False,
        export_of=lambda disk: NbdUri(host="a", port=10809, export=disk.drive),
    )
    m = SimpleNamespace(
        plan=plan,
        a=at,
        disks=disks,
        during=during,
        overlay_monitors={"one": at, "two": at},
        state=SimpleNamespace(exporter="/run", certificates=None),
    )
    made = Tracker(cast(Migration, m), ["n1", "n2"], cast(Vm, at))
    made._number, made._ended = 1, [0]
    return made


def test_the_last_bitmap_ends_before_it_is_exported_and_every_overlay_is_told_of_all() -> None:
    told: list[str] = []
    assert asyncio.run(tracker(told).finish()) == 4 << 16
    assert told[:3] == [
        "transaction n1 n2",
        "block-export-add nbd-migrate-bitmap-one",
        "block-export-add nbd-migrate-bitmap-two",
    ]
    assert sorted(told[3:]) == sorted(
        [
            *(f"block-export-add bitmap-{name}" for name in ("one", "two")),
            *(f"overlay-invalidate nbd-migrate-{number}" for number in (0, 1) for _ in range(2)),
        ]
    )


@pytest.mark.parametrize("refused", ["transaction", "block-export-add", "overlay-invalidate"])
def test_a_guest_does_not_go_whose_last_bitmap_is_not_forgotten(refused: str) -> None:
    told: list[str] = []
    with pytest.raises(MigrationError, match=f"no {refused}"):
        asyncio.run(tracker(told, refused).finish())
    if refused != "overlay-invalidate":
        assert not any("overlay-invalidate" in each for each in told)
