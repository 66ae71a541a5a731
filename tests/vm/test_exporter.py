"""A QEMU's NBD server for our server alone: real QEMUs, without a guest."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nbdserve.client import connect as connect_nbd
from nbdserve.common import clock
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.migrate.journal import Journal
from recipes.migrate.leftovers import end_exporter, remove_exporter
from recipes.migrate.state import Phase
from recipes.qemu import exporter
from recipes.qemu.exporter import NodeExport
from recipes.qemu.vm import CommandError, Vm, connect
from tests.support.disks import MIB, random_bytes
from tests.support.journals import begun
from tests.support.processes import Process, check, listens

HERE = Host("this host")
SECONDS = 120.0
SIZE = 4 * MIB


@dataclass(frozen=True)
class Source:
    """A QEMU that has a qcow2 image open, over a raw one."""

    directory: Path
    content: bytes

    @property
    def monitor(self) -> Path:
        return self.directory / "a.qmp"

    @property
    def place(self) -> Path:
        return self.directory / "a.qcow2.export"

    def during(self, body: Callable[[Vm], Awaitable[None]]) -> None:
        """Do this while connected to the monitor."""

        async def connected() -> None:
            vm = await connect("A's QEMU", str(self.monitor), limit=SECONDS, command_limit=SECONDS)
            try:
                await body(vm)
            finally:
                await vm.disconnect()

        clock.run(connected())


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    """The images' content is only to be had through both of them."""
    base, image = tmp_path / "base.raw", tmp_path / "a.qcow2"
    base.write_bytes(random_bytes(SIZE))
    check("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, image)
    check("qemu-io", "-f", "qcow2", "-c", f"write -P 0x5a {MIB} {MIB}", image)
    content = base.read_bytes()
    made = Source(tmp_path, content[:MIB] + b"\x5a" * MIB + content[2 * MIB :])
    argv = [
        *("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"),
        *("-blockdev", f"driver=qcow2,node-name=disk,file.driver=file,file.filename={image}"),
        *("-qmp", f"unix:{made.monitor},server=on,wait=off"),
    ]
    with Process(argv, tmp_path / "a.log") as qemu:
        qemu.wait_for(lambda: listens(made.monitor), "its monitor", SECONDS)
        yield made


def read(source: Source, name: str) -> bytes:
    """All that an export of the QEMU holds."""
    client = connect_nbd(NodeExport(name, "").uri(f"{source.place}/nbd"), timeout=SECONDS)
    try:
        found = bytearray(SIZE)
        client.start_read(0, memoryview(found)).result(SECONDS)
        return bytes(found)
    finally:
        client.close()


async def placed(source: Source) -> str:
    """The socket, in its directory."""
    return await exporter.place(HERE, str(source.place), "", SECONDS)


@pytest.mark.representative
def test_an_image_in_use_is_served_with_all_that_is_below_it_to_nobody_else(source: Source) -> None:
    async def body(vm: Vm) -> None:
        await exporter.require_none(vm)
        await exporter.start(vm, await placed(source))
        await exporter.add(vm, NodeExport("disk0", "disk"))
        assert stat.S_IMODE(source.place.stat().st_mode) == 0o700
        assert await asyncio.to_thread(read, source, "disk0") == source.content
        assert await exporter.stop(vm) == ""
        assert await vm.execute("query-block-exports") == []
        await exporter.require_none(vm)
        await exporter.remove_place(HERE, str(source.place), SECONDS)
        assert not source.place.exists()

    source.during(body)


@pytest.mark.representative
def test_a_qemu_that_has_an_nbd_server_is_refused_and_keeps_it(source: Source) -> None:
    another = {"type": "unix", "data": {"path": str(source.directory / "another")}}

    async def body(vm: Vm) -> None:
        await vm.execute("nbd-server-start", addr=another)
        for attempt in (exporter.require_none(vm), exporter.start(vm, await placed(source))):
            with pytest.raises(
                MigrationError, match=r"A's QEMU has an NBD server already, .*: nbd-server-stop$"
            ):
                await attempt
        # A crash in between may leave a journal that says there is one.
        await vm.execute("block-export-add", type="nbd", id="theirs", node_name="disk", name="theirs")
        assert "exports of somebody else (theirs), which was left running" in await exporter.stop(vm)
        assert [each["id"] for each in await vm.execute("query-block-exports")] == ["theirs"]

    source.during(body)
    assert listens(source.directory / "another")


def test_what_cannot_be_listened_on_leaves_no_server(source: Source) -> None:
    async def body(vm: Vm) -> None:
        with pytest.raises(MigrationError, match=r"A's QEMU cannot serve its disks at .*: Failed to "):
            await exporter.start(vm, str(source.place / "nothing" / "nbd"))
        await exporter.require_none(vm)
        assert await exporter.stop(vm) == ""

    source.during(body)


def test_bitmaps_are_told_once_they_do_not_record_and_are_free_when_the_export_is_removed(
    source: Source,
) -> None:
    async def body(vm: Vm) -> None:
        await exporter.start(vm, await placed(source))
        await vm.execute("block-dirty-bitmap-add", node="disk", name="b0")
        with pytest.raises(CommandError, match="Enabled bitmap 'b0' incompatible with readonly export"):
            await exporter.add(vm, NodeExport("round1", "disk", ("b0",)))
        await vm.execute("block-dirty-bitmap-disable", node="disk", name="b0")
        await exporter.add(vm, NodeExport("round1", "disk", ("b0",)))
        listed = check("nbdinfo", "--list", f"nbd+unix:///?socket={source.place}/nbd")
        assert "qemu:dirty-bitmap:b0" in listed
        with pytest.raises(CommandError, match="in use"):
            await vm.execute("block-dirty-bitmap-remove", node="disk", name="b0")
        client = connect_nbd(NodeExport("round1", "").uri(f"{source.place}/nbd"), timeout=SECONDS)
        try:
            await exporter.remove(vm, "round1")
        finally:
            client.close()
        await vm.execute("block-dirty-bitmap-remove", node="disk", name="b0")
        await exporter.remove(vm, "round1")
        await exporter.stop(vm)

    source.during(body)


def journal_that_names(source: Source) -> Journal:
    """A journal of a migration that has, or may have, the QEMU serve its disks."""
    journal = begun(source.directory, str(source.monitor), Phase.EXPORT)
    assert journal.state is not None
    journal.append(replace(journal.state, exporter=str(source.place)))
    return journal


@pytest.mark.parametrize("made", ["nothing", "the directory", "the server", "everything"])
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_a_migration_that_is_given_up_leaves_none_of_it_however_far_it_came(
    source: Source, made: str
) -> None:
    state = journal_that_names(source).state
    assert state is not None
    assert not state.is_clear

    async def body(vm: Vm) -> None:
        if made != "nothing":
            path = await placed(source)
        if made in ("the server", "everything"):
            await exporter.start(vm, path)
        if made == "everything":
            await exporter.add(vm, NodeExport("disk0", "disk"))
        client = (
            connect_nbd(NodeExport("disk0", "").uri(path), timeout=SECONDS) if made == "everything" else None
        )
        try:
            assert await end_exporter(vm, state) == ([], [])
        finally:
            if client:
                client.close()
        assert await remove_exporter(HERE, state, SECONDS) == []
        assert not source.place.exists()
        await exporter.require_none(vm)

    source.during(body)


def test_what_is_left_of_it_is_told_with_what_to_type(source: Source) -> None:
    state = journal_that_names(source).state
    assert state is not None
    source.place.mkdir()
    (source.place / "mine").write_text("mine")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(source.place / "nbd"))

    async def body(vm: Vm) -> None:
        [told] = await remove_exporter(HERE, state, SECONDS)
        assert told.startswith(f"{source.place} is still on this host (")
        assert told.endswith(f": remove it: rm -r -- {source.place}")
        assert [path.name for path in source.place.iterdir()] == ["mine"]

    source.during(body)
