"""What A's QEMU and the overlays are told of the last bitmap, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from recipes.errors import MigrationError
from recipes.migrate.runtime import Migration
from recipes.precopy.tracker import Tracker
from recipes.qemu.vm import CommandError, Vm

SIZE = 8 << 20


class Monitor:
    """One that notes what it is told, in the order in which that comes, and refuses what it is to refuse."""

    def __init__(self, told: list[str], refuses: str = "") -> None:
        self._told, self._refuses = told, refuses

    async def call(self, command: str, given: Mapping[str, Any], *, limit: float = 0.0) -> Any:
        names = [str(each["data"]["node"]) for each in given.get("actions", [])]
        names += [str(given[key]) for key in ("id", "bitmap", "offset", "ranges") if key in given]
        self._told.append(" ".join([command, *names]))
        await asyncio.sleep(0)
        if command == self._refuses:
            raise CommandError(f"no {command}", "no")
        if command == "x-query-dirty-bitmap":
            # In two parts: what of a disk is told first ends at its half.
            place = given["offset"]
            return {"size": SIZE, "ranges": [[place, 1 << 16]], "next": None if place else SIZE // 2}
        return {"bytes": 1 << 16}

    async def execute(self, command: str, **given: object) -> Any:
        return await self.call(command, given)


def tracker(told: list[str], refuses: str = "", size: int = SIZE) -> Tracker:
    """One that has two disks, and one bitmap more than the one that records."""

    async def during(work: Awaitable[Any], limit: float, what: str) -> Any:
        return await work

    disks = [SimpleNamespace(drive=name) for name in ("one", "two")]
    at = Monitor(told, refuses)
    m = SimpleNamespace(
        plan=SimpleNamespace(limits=SimpleNamespace(command=60.0)),
        a=at,
        disks=disks,
        during=during,
        overlay_monitors={"one": at, "two": at},
        state=SimpleNamespace(exporter="/run", disk=lambda disk: SimpleNamespace(size=size)),
    )
    made = Tracker(cast(Migration, m), ["n1", "n2"], cast(Vm, at))
    made._number, made._ended = 1, [0]
    return made


def test_the_last_bitmap_ends_before_it_is_exported_and_every_overlay_is_told_of_all() -> None:
    told: list[str] = []
    assert asyncio.run(tracker(told).finish()) == 8 << 16
    assert told[:3] == [
        "transaction n1 n2",
        "block-export-add nbd-migrate-bitmap-one-1",
        "block-export-add nbd-migrate-bitmap-two-1",
    ]
    halves = (0, SIZE // 2)
    assert sorted(told[3:]) == sorted(
        [
            *(
                f"x-query-dirty-bitmap nbd-migrate-{number} {half}"
                for number in (0, 1)
                for half in halves
                for _ in range(2)
            ),
            *(f"overlay-invalidate [[{half}, 65536]]" for half in halves for _ in range(4)),
        ]
    )


@pytest.mark.parametrize(
    "refused", ["transaction", "block-export-add", "x-query-dirty-bitmap", "overlay-invalidate"]
)
def test_a_guest_does_not_go_whose_last_bitmap_is_not_forgotten(refused: str) -> None:
    told: list[str] = []
    with pytest.raises(MigrationError, match=f"no {refused}"):
        asyncio.run(tracker(told, refused).finish())
    if refused != "overlay-invalidate":
        assert not any("overlay-invalidate" in each for each in told)


def test_a_bitmap_of_another_disk_is_none_of_the_guest_s() -> None:
    told: list[str] = []
    made = tracker(told, size=SIZE // 2)
    with pytest.raises(MigrationError, match="is of a disk of"):
        asyncio.run(made.finish())
    assert not any("overlay-invalidate" in each for each in told)
