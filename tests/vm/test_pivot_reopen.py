"""Why the pivot is a mirror: what ``blockdev-reopen`` does in its place, and what it cannot.

When a QEMU reopens a node whose server is away, these tests fail, and the pivot may be thought over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError

from tests.support.delay import delayed
from tests.support.processes import Process, wait_until
from tests.support.servers import UnixAddress, nbdkit
from tests.support.vms import DISK_SIZE, QEMU, Monitor, monitor, original_disk
from tests.vm.test_pivot import NODE, Machine

SWAPS = 12


def nbd(address: Path) -> dict[str, object]:
    """The node of the socket."""
    server = {"type": "unix", "path": str(address)}
    return {"driver": "nbd", "node-name": "nbd", "server": server, "reconnect-delay": 1, "discard": "unmap"}


def file(disk: Path) -> dict[str, object]:
    """The node of the file."""
    return {"driver": "file", "node-name": "file", "filename": str(disk), "discard": "unmap"}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[tuple[Machine, Path]]:
    """A guest that writes to a raw node above an NBD node, and the socket of that."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(original_disk(DISK_SIZE))
    with nbdkit("file", disk, directory=tmp_path) as server:
        assert isinstance(server.address, UnixAddress)
        with delayed(server.address, 0.01, tmp_path) as near:
            raw = {"driver": "raw", "node-name": NODE, "file": "nbd", "discard": "unmap"}
            argv = [
                *QEMU,
                *("-blockdev", json.dumps(nbd(near.path)), "-blockdev", json.dumps(raw)),
                *("-device", f"virtio-blk-pci,drive={NODE},id=vd0,rerror=stop,werror=stop"),
                *("-qmp", f"unix:{tmp_path / 'qmp'},server=on,wait=off"),
                *("-serial", f"file:{tmp_path / 'serial'}"),
            ]
            with Process(argv, tmp_path / "qemu.log") as qemu:
                made = Machine(tmp_path, server, qemu)
                made.wait_until_it_works()
                yield made, near.path


def add(qemu: Monitor, node: dict[str, object]) -> None:
    """Open what the guest is to move to."""
    qemu.execute("blockdev-add", **{name.replace("-", "_"): value for name, value in node.items()})


def reopen(qemu: Monitor, child: str) -> None:
    """Put a node under the guest's, in the place of the one that is there."""
    node = {"driver": "raw", "node-name": NODE, "read-only": False, "discard": "unmap", "file": child}
    qemu.execute("blockdev-reopen", options=[node])


def test_a_guest_that_writes_moves_there_and_back_without_a_job(machine: tuple[Machine, Path]) -> None:
    made, near = machine
    with monitor(made.monitor) as qemu:
        for number in range(SWAPS):
            new, old = (file(made.disk), "nbd") if number % 2 == 0 else (nbd(near), "file")
            add(qemu, new)
            reopen(qemu, str(new["node-name"]))
            qemu.execute("blockdev-del", node_name=old)
            made.wait_until_it_works()
    assert made.lost() == []


def test_it_is_refused_while_the_server_is_dead_where_a_mirror_needs_nobody(
    machine: tuple[Machine, Path],
) -> None:
    """QEMU flushes the node that it is about to leave. The file has everything, but QEMU cannot know that."""
    made, _ = machine
    with monitor(made.monitor) as qemu:
        made.server.process.kill()
        wait_until(lambda: qemu.execute("query-status")["status"] == "io-error", "the guest waits", 60.0)
        add(qemu, file(made.disk))
        for _ in range(3):
            with pytest.raises(ExecuteError, match="Error flushing drive"):
                reopen(qemu, "file")
            time.sleep(0.2)
        qemu.execute("blockdev-del", node_name="file")
    made.pivot()
    assert made.nodes == {f"{NODE}-local", "nbd"}
    made.wait_until_it_works()
    assert made.lost() == []
