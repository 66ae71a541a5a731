"""The bitmaps of a migration: what QEMU's answers mean."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from recipes.errors import MigrationError
from recipes.qemu import bitmaps
from recipes.qemu.vm import Vm


class Nodes:
    """A QEMU with these block nodes, each with its bitmaps, by name with their bytes."""

    def __init__(self, nodes: dict[str, dict[str, int]]) -> None:
        self._nodes = nodes

    async def execute(self, command: str, **_: object) -> object:
        assert command == "query-named-block-nodes"
        return [
            {
                "node-name": node,
                "dirty-bitmaps": [{"name": name, "count": count} for name, count in of.items()],
            }
            for node, of in self._nodes.items()
        ]


def dirty(nodes: dict[str, dict[str, int]]) -> dict[str, int]:
    return asyncio.run(bitmaps.dirty_bytes(cast(Vm, Nodes(nodes)), ["a", "b"], 1))


def test_the_bytes_of_each_node_are_those_of_the_bitmap_that_was_asked_for() -> None:
    mine = {"nbd-migrate-0": 1, "nbd-migrate-1": 2}
    assert dirty({"a": mine, "b": {"nbd-migrate-1": 3, "other": 4}}) == {"a": 2, "b": 3}


@pytest.mark.parametrize(
    "nodes",
    [{"a": {"nbd-migrate-1": 0}}, {"a": {"nbd-migrate-1": 0}, "b": {"nbd-migrate-0": 0}}],
    ids=["unplugged", "bitmap-removed"],
)
def test_a_disk_that_records_no_more_is_told_by_its_name(nodes: dict[str, dict[str, int]]) -> None:
    """What its guest writes meanwhile would be missing on B."""
    with pytest.raises(MigrationError, match=r"^A's QEMU records no more what its guest writes to b: "):
        dirty(nodes)
