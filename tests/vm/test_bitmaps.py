"""A migration's dirty bitmaps in a QEMU: real ones, without a guest; a writable export is what writes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.client import connect as connect_nbd
from nbdserve.common import clock
from recipes.hosts.host import Host
from recipes.migrate.leftovers import end_exporter, remove_exporter
from recipes.migrate.state import Phase
from recipes.qemu import bitmaps, exporter
from recipes.qemu.bitmaps import Tracking
from recipes.qemu.exporter import NodeExport
from recipes.qemu.vm import CommandError, Vm, connect
from tests.support.disks import MIB
from tests.support.journals import begun
from tests.support.processes import Process, listens

SECONDS = 120.0
SIZE = 4 * MIB
NODES = ("disk0", "disk1")


def with_qemu(directory: Path, body: Callable[[Vm], Awaitable[None]]) -> None:
    """Do this with a QEMU that has two disks."""
    address = directory / "a.qmp"
    argv = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
    for node in NODES:
        (directory / node).write_bytes(bytes(SIZE))
        argv += [
            "-blockdev",
            f"driver=raw,node-name={node},file.driver=file,file.filename={directory / node}",
        ]

    async def connected() -> None:
        vm = await connect("A's QEMU", str(address), limit=SECONDS, command_limit=SECONDS)
        try:
            await body(vm)
        finally:
            await vm.disconnect()

    argv += ["-qmp", f"unix:{address},server=on,wait=off"]
    with Process(argv, directory / "a.log") as qemu:
        qemu.wait_for(lambda: listens(address), "its monitor", SECONDS)
        clock.run(connected())


async def write(vm: Vm, node: str, offset: int) -> None:
    """Change a byte of a disk, as a guest does."""
    command = f'qemu-io {node} "write -q {offset} 512"'
    assert not await vm.execute("human-monitor-command", command_line=command)


async def names(vm: Vm) -> dict[str, list[str]]:
    """The bitmaps of each disk."""
    found = await vm.execute("query-named-block-nodes", flat=True)
    return {
        each["node-name"]: sorted(bitmap["name"] for bitmap in each.get("dirty-bitmaps", []))
        for each in found
        if each["node-name"] in NODES
    }


@pytest.mark.representative
def test_no_write_is_between_two_bitmaps_and_each_is_marked_for_its_granule(tmp_path: Path) -> None:
    async def body(vm: Vm) -> None:
        await bitmaps.begin(vm, NODES, 0)
        await write(vm, "disk0", 0)
        await write(vm, "disk0", MIB)
        assert await bitmaps.dirty_bytes(vm, NODES, 0) == {"disk0": 2 * bitmaps.GRANULARITY, "disk1": 0}
        await bitmaps.swap(vm, NODES, 0)
        await write(vm, "disk0", MIB)
        await write(vm, "disk1", 3 * MIB)
        assert await bitmaps.dirty_bytes(vm, NODES, 0) == {"disk0": 2 * bitmaps.GRANULARITY, "disk1": 0}
        wanted = {"disk0": bitmaps.GRANULARITY, "disk1": bitmaps.GRANULARITY}
        assert await bitmaps.dirty_bytes(vm, NODES, 1) == wanted
        await bitmaps.remove(vm, NODES, 0)
        await bitmaps.end(vm, NODES, 1)
        await write(vm, "disk0", 0)
        assert await bitmaps.dirty_bytes(vm, NODES, 1) == wanted

    with_qemu(tmp_path, body)


@pytest.mark.representative
def test_they_begin_on_all_disks_or_on_none(tmp_path: Path) -> None:
    async def body(vm: Vm) -> None:
        await vm.execute("block-dirty-bitmap-add", node="disk1", name=bitmaps.name_of(0))
        with pytest.raises(CommandError, match="already exists"):
            await bitmaps.begin(vm, NODES, 0)
        assert await names(vm) == {"disk0": [], "disk1": [bitmaps.name_of(0)]}

    with_qemu(tmp_path, body)


@pytest.mark.representative
def test_a_migration_that_is_given_up_leaves_those_of_others_alone(tmp_path: Path) -> None:
    monitor = tmp_path / "nbdserve.qmp"
    monitor.touch()
    state = begun(tmp_path, str(tmp_path / "a.qmp"), Phase.PRECOPY).state
    assert state is not None
    here, place = Host("this host"), str(tmp_path / "export")
    state = replace(state, exporter=place, tracking=Tracking((*NODES, "gone"), str(monitor)))

    async def body(vm: Vm) -> None:
        await vm.execute("block-dirty-bitmap-add", node="disk0", name="backup")
        await bitmaps.begin(vm, NODES, 0)
        await bitmaps.swap(vm, NODES, 0)
        await exporter.start(vm, await exporter.place(here, place, "", SECONDS))
        exported = NodeExport("bitmap", "disk0", (bitmaps.name_of(0),))
        await exporter.add(vm, exported)
        uri = exported.uri(f"{place}/{exporter.SOCKET}")
        client = await asyncio.to_thread(connect_nbd, uri, timeout=SECONDS)
        try:
            assert await end_exporter(vm, state) == ([], [])
        finally:
            client.close()
        assert await names(vm) == {"disk0": ["backup"], "disk1": []}
        assert await end_exporter(vm, state) == ([], [])
        assert await remove_exporter(here, state, SECONDS) == []
        assert not monitor.exists()

    with_qemu(tmp_path, body)
