"""The pivot: a guest that writes all the time moves from an NBD server to the file that it serves."""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from nbdserve.backends.imagelocks import EXCLUSIVE, WRITER, ImageLocks
from recipes.errors import MigrationError
from recipes.qemu.pivot import Pivot, ServerAwayError, pivot
from recipes.qemu.vm import Vm, connect
from tests.support.boot_sector import RECORDS, SECTOR, is_record
from tests.support.delay import delayed
from tests.support.disks import MIB
from tests.support.processes import Process, check, listens, run, wait_until
from tests.support.servers import Server, UnixAddress, nbdkit
from tests.support.vms import DISK_SIZE, QEMU, monitor, original_disk

NODE = "disk0"
SOCKET = "disk0-socket"
MOVED = {NODE, "disk0-local"}
"""The nodes of a guest that has moved."""

BACKEND = "/machine/peripheral/vd0/virtio-backend"


NBD_MIGRATE = Path(sys.executable).with_name("nbd-migrate")


class Killed(BaseException):
    """Stands for the end of the orchestrator."""


class Mortal:
    """A Vm whose user dies when it has executed so many commands; ``before`` is called before each."""

    def __init__(self, vm: Vm, commands: int, before: Callable[[str], None]) -> None:
        self._vm = vm
        self._commands = commands
        self._before = before

    async def call(self, command: str, given: Mapping[str, object], *, limit: float | None = None) -> Any:
        self._before(command)
        answer = await self._vm.call(command, given, limit=limit)
        self._commands -= 1
        if self._commands == 0:
            raise Killed
        return answer


@dataclass(frozen=True)
class Machine:
    """A guest whose disk is on an NBD node, and the server that serves the file behind it."""

    directory: Path
    server: Server
    qemu: Process

    @property
    def disk(self) -> Path:
        """The file."""
        return self.directory / "disk.raw"

    @property
    def monitor(self) -> Path:
        """QEMU's monitor."""
        return self.directory / "qmp"

    def pivot(
        self,
        image: Path | None = None,
        *,
        commands: int = 0,
        before: Callable[[str], None] = lambda _: None,
        **more: Any,
    ) -> None:
        """Pivot to the file, or to another one; with ``commands`` be killed after so many."""

        async def body() -> None:
            vm = await connect("B's QEMU", str(self.monitor), limit=60.0, command_limit=60.0)
            try:
                mortal = cast(Vm, Mortal(vm, commands, before))
                await pivot(mortal, Pivot(NODE, str(image or self.disk), 60.0, **more))
            finally:
                await vm.disconnect()

        asyncio.run(body())

    @property
    def records(self) -> int:
        """How many records the guest has written."""
        console = self.directory / "serial"
        return console.read_bytes().count(b".") if console.exists() else 0

    def wait_until_it_works(self) -> None:
        """The guest writes and reads."""
        before = self.records
        wait_until(lambda: self.records > before + 2, "the guest works", 15.0)

    @property
    def nodes(self) -> set[str]:
        """The block nodes that have names."""
        with monitor(self.monitor) as qemu:
            nodes = qemu.execute("query-named-block-nodes", flat=True)
        return {each["node-name"] for each in nodes if not each["node-name"].startswith("#")}

    def lost(self) -> list[int]:
        """Stop the guest; the numbers of the records that it had written but the file does not have."""
        with monitor(self.monitor) as qemu:
            qemu.execute("stop")
        written, content = self.records, self.disk.read_bytes()
        for sector in range(DISK_SIZE // SECTOR):
            found = content[sector * SECTOR : (sector + 1) * SECTOR]
            if sector not in RECORDS or not is_record(sector, found):
                assert found == original_disk(DISK_SIZE)[sector * SECTOR : (sector + 1) * SECTOR], sector
        lost = []
        for number in range(max(1, written - len(RECORDS) + 2), written + 1):
            offset = (RECORDS.start + number % len(RECORDS)) * SECTOR
            # The guest may have been stopped before it announced the record that came a round later.
            if struct.unpack_from("<I", content, offset)[0] not in (number, number + len(RECORDS)):
                lost.append(number)
        return lost


def arguments(
    address: UnixAddress, directory: Path, *options: str, device: str = "virtio-blk-pci"
) -> list[str]:
    """A machine whose disk is a raw node on an NBD node."""
    server = {"type": "unix", "path": str(address.path)}
    socket = {
        "node-name": SOCKET,
        "driver": "nbd",
        "server": server,
        "reconnect-delay": 1,
        "discard": "unmap",
    }
    node = {"node-name": NODE, "driver": "raw", "discard": "unmap", "file": SOCKET}
    return [
        *QEMU,
        *("-blockdev", json.dumps(socket), "-blockdev", json.dumps(node)),
        *("-device", f"{device},drive={NODE},id=vd0,rerror=stop,werror=stop"),
        *("-qmp", f"unix:{directory / 'qmp'},server=on,wait=off"),
        *options,
    ]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A guest with a virtio disk."""
    with guest(tmp_path, "virtio-blk-pci") as made:
        yield made


@contextmanager
def guest(tmp_path: Path, device: str) -> Iterator[Machine]:
    """A guest that writes to its disk at an NBD server, whose answers take 10 ms."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(original_disk(DISK_SIZE))
    # nbdkit holds no image locks, as nbd-overlay does not any more when everything is local.
    with nbdkit("file", disk, directory=tmp_path) as server:
        assert isinstance(server.address, UnixAddress)
        with delayed(server.address, 0.01, tmp_path) as near:
            argv = arguments(near, tmp_path, "-serial", f"file:{tmp_path / 'serial'}", device=device)
            with Process(argv, tmp_path / "qemu.log") as qemu:
                made = Machine(tmp_path, server, qemu)
                made.wait_until_it_works()
                yield made


@pytest.mark.representative
def test_a_guest_moves_to_the_local_file_while_it_writes(machine: Machine) -> None:
    machine.pivot()
    assert machine.nodes == MOVED
    assert machine.server.process.terminate() == 0
    machine.wait_until_it_works()
    assert machine.lost() == []


def test_the_command_pivots_and_may_be_given_again(machine: Machine) -> None:
    for _ in range(2):
        done = run(NBD_MIGRATE, "pivot", "--qmp", machine.monitor, "--node", NODE, machine.disk)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"the guest's disk is {machine.disk}; ")
        assert machine.nodes == MOVED
    assert machine.server.process.terminate() == 0
    machine.wait_until_it_works()
    assert machine.lost() == []


def test_the_command_refuses_an_image_that_is_not_complete(tmp_path: Path) -> None:
    """Nobody needs to be asked for that."""
    image = tmp_path / "b.raw"
    overlay = NBD_MIGRATE.with_name("nbd-overlay")
    check(overlay, "create", "--backing", "nbd://192.0.2.1/vm", "--size", "1M", image)
    done = run(NBD_MIGRATE, "pivot", "--qmp", tmp_path / "qmp", image)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"{image}: 0 of {MIB} bytes are local; complete it first" in done.stderr
    (tmp_path / "b.raw.map").unlink()
    done = run(NBD_MIGRATE, "pivot", "--qmp", tmp_path / "qmp", image)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert str(image) in done.stderr


def test_whoever_comes_after_an_orchestrator_that_died_between_two_commands_goes_on(machine: Machine) -> None:
    """Each does one command more than the one before, until one finds everything done."""
    for commands in range(1, 40):
        try:
            machine.pivot(commands=commands)
        except Killed:
            machine.wait_until_it_works()
        else:
            break
    assert commands > 5
    assert machine.nodes == MOVED
    assert machine.server.process.terminate() == 0
    machine.wait_until_it_works()
    assert machine.lost() == []


@pytest.mark.parametrize("commands", range(1, 9))
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_an_orchestrator_that_dies_leaves_what_another_one_can_finish_at_once(
    machine: Machine, commands: int
) -> None:
    with suppress(Killed):
        machine.pivot(commands=commands)
    machine.pivot()
    machine.pivot()
    assert machine.nodes == MOVED
    machine.wait_until_it_works()
    assert machine.lost() == []


@pytest.mark.parametrize("moment", ["blockdev-add", "blockdev-reopen", "blockdev-del"])
@pytest.mark.representative
@pytest.mark.sampled(1)
def test_a_server_that_dies_in_the_middle_costs_time_but_no_data(tmp_path: Path, moment: str) -> None:
    """QEMU flushes to the server before it parts from it; once that is there again, it does."""
    disk, address = tmp_path / "disk.raw", UnixAddress(tmp_path / "nbd")
    disk.write_bytes(original_disk(DISK_SIZE))
    serve = ["nbdkit", "-f", "-U", str(address.path), "file", str(disk)]
    serial = tmp_path / "serial"
    server = Process(serve, tmp_path / "nbdkit.log")
    with ExitStack() as stack:
        stack.enter_context(server)
        server.wait_for(lambda: listens(address.path), "a server")
        argv = arguments(address, tmp_path, "-serial", f"file:{serial}")
        qemu = stack.enter_context(Process(argv, tmp_path / "qemu.log"))
        machine = Machine(tmp_path, Server(server, address, server.pid), qemu)
        machine.wait_until_it_works()

        def strike(command: str) -> None:
            if command == moment and server.running:
                server.kill()
                # Until the guest has asked it for something.
                time.sleep(0.3)

        if moment == "blockdev-del":
            machine.pivot(before=strike)
        else:
            with pytest.raises(ServerAwayError, match=r"its server is away; serve .* there again"):
                machine.pivot(before=strike)
            assert machine.nodes == {NODE, SOCKET}
            address.path.unlink()
            with Process(
                ["nbdkit", "-f", "-U", str(address.path), "file", str(disk)], tmp_path / "again.log"
            ):
                wait_until(lambda: moves(machine), "the guest moves", 30.0, 0.5)
        assert machine.nodes == MOVED
        machine.wait_until_it_works()
        assert machine.lost() == []


def moves(machine: Machine) -> bool:
    """Pivot, if that can be done yet."""
    try:
        machine.pivot()
    except ServerAwayError:
        return False
    return True


def refused(machine: Machine, image: Path) -> str:
    """What is said about a file to which the guest must not move; the guest works as before."""
    with pytest.raises(MigrationError) as caught:
        machine.pivot(image)
    assert machine.nodes == {NODE, SOCKET}
    machine.wait_until_it_works()
    return str(caught.value)


@pytest.mark.representative
def test_a_file_that_cannot_be_the_guests_disk_is_refused(machine: Machine) -> None:
    assert "refused blockdev-add: Could not open" in refused(machine, machine.directory / "no.raw")
    other = machine.directory / "other.raw"
    other.write_bytes(bytes(MIB))
    assert f"{other} has {MIB} bytes, the guest's disk {DISK_SIZE}" in refused(machine, other)
    with machine.disk.open("r+b") as image:
        ImageLocks(image.fileno(), str(machine.disk)).hold(WRITER, EXCLUSIVE)
        assert "lock" in refused(machine, machine.disk)
    assert machine.lost() == []


@pytest.mark.parametrize("device", ["virtio-blk-pci", "ide-hd,bus=ide.0"])
def test_any_disk_moves_between_socket_and_file_again_and_again(tmp_path: Path, device: str) -> None:
    """A mirror ends QEMU 7.2 at the first time, with an IDE disk."""
    with guest(tmp_path, device) as machine, monitor(machine.monitor) as qemu:
        file = {"driver": "file", "filename": str(machine.disk), "discard": "unmap"}
        for number in range(40):
            below = SOCKET if number % 2 else "file"
            if below == "file":
                qemu.execute("blockdev-add", **file, node_name="file")
            raw = {"driver": "raw", "node-name": NODE, "discard": "unmap", "file": below}
            qemu.execute("blockdev-reopen", options=[raw])
            if below == SOCKET:
                qemu.execute("blockdev-del", node_name="file")
            time.sleep(0.05)
        qemu._qmp.close()
        machine.pivot()
        machine.wait_until_it_works()
        assert machine.lost() == []


@pytest.mark.parametrize("direct", [True, False])
def test_the_file_is_opened_as_it_is_told_if_qemu_can(machine: Machine, direct: bool) -> None:
    cache = {"direct": direct, "no-flush": False}
    machine.pivot(opening={"cache": cache, "aio": "native"}, guests={"detect-zeroes": "unmap"})
    with monitor(machine.monitor) as qemu:
        nodes = {each["node-name"]: each for each in qemu.execute("query-named-block-nodes", flat=True)}
    # It refuses native requests through the page cache, and opens the file as ever.
    assert nodes["disk0-local"]["cache"]["direct"] == direct
    assert nodes[NODE]["detect_zeroes"] == "unmap"
    machine.wait_until_it_works()
    assert machine.lost() == []


@pytest.mark.representative
@pytest.mark.parametrize("removed", [False, True], ids=["unplugged", "node-removed"])
def test_a_disk_that_was_unplugged_lets_go_of_its_socket_too(tmp_path: Path, removed: bool) -> None:
    """It would be served, and the migration never over, for as long as B's QEMU lives."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(original_disk(DISK_SIZE))
    with nbdkit("file", disk, directory=tmp_path) as server:
        assert isinstance(server.address, UnixAddress)
        argv = arguments(server.address, tmp_path)
        at = argv.index("-device")
        with Process([*argv[:at], *argv[at + 2 :]], tmp_path / "qemu.log") as qemu:
            machine = Machine(tmp_path, server, qemu)
            wait_until(lambda: listens(machine.monitor), "it listens")
            if removed:
                with monitor(machine.monitor) as vm:
                    vm.execute("blockdev-del", **{"node-name": NODE})
            machine.pivot()
            assert machine.nodes == (set() if removed else MOVED)


def test_a_node_that_is_no_raw_one_is_refused(machine: Machine) -> None:
    async def body() -> None:
        vm = await connect("B's QEMU", str(machine.monitor), limit=60.0, command_limit=60.0)
        try:
            await pivot(vm, Pivot(SOCKET, str(machine.disk), 60.0))
        finally:
            await vm.disconnect()

    with pytest.raises(MigrationError, match=f"no device of B's QEMU uses {SOCKET}"):
        asyncio.run(body())
