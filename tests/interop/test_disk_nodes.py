"""The disks of a plan in a QEMU that knows them by other names: real QEMUs and images, without a guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.common import clock
from nbdserve.common.errors import UsageError
from recipes.checks.chains import check_chains
from recipes.checks.disk_nodes import check_open, disk_nodes
from recipes.discovery.process import find
from recipes.hosts.host import Host
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Destination, Export, Plan, Source
from recipes.qemu.vm import connect
from tests.support.disks import MIB
from tests.support.processes import Process, check, listens

HERE = Host("this host")
SECONDS = 120.0


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where a QEMU is started, with images beside and below it, and one of the same name elsewhere."""
    for name in ("vm", "vm/sub", "disks", "elsewhere"):
        (tmp_path / name).mkdir()
    for name in ("vm/a.raw", "vm/sub/b.raw", "disks/c.raw", "elsewhere/a.raw", "vm/base.raw"):
        (tmp_path / name).write_bytes(bytes(MIB))
    made = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", "top.qcow2")
    check(*made, cwd=tmp_path / "vm")
    return tmp_path / "vm"


def started(directory: Path, *files: str) -> Process:
    """A QEMU that has been given these files, by these names."""
    drives = [
        word
        for file in files
        for word in ("-drive", f"file={file},if=none,format={'raw' if file.endswith('raw') else 'qcow2'}")
    ]
    argv = ("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", *drives)
    argv = (*argv, "-qmp", f"unix:{directory / 'a.qmp'},server=on,wait=off")
    return Process(argv, directory / "a.log", cwd=directory)


def looked_at(directory: Path, *disks: PlannedDisk) -> None:
    """Look for the disks as a migration does before it begins."""
    monitor = str(directory / "a.qmp")
    plan = Plan(
        Source(qmp=monitor),
        Export("nbd://127.0.0.1/vm"),
        Destination(qemu=("qemu",), qmp="/run/b.qmp", migration="unix:/run/m"),
        disk=disks,
    )

    async def body() -> None:
        a = await connect("A's QEMU", monitor, limit=SECONDS, command_limit=SECONDS)
        try:
            nodes = await disk_nodes(plan, a)
            await check_open(plan, nodes, HERE)
            await check_chains(plan, nodes, HERE)
        finally:
            await a.disconnect()

    clock.run(body())


def planned(number: int, image: Path, layout: str = "raw") -> PlannedDisk:
    """A disk of the plan."""
    return PlannedDisk(str(image), f"/b{number}.raw", f"disk{number}", format=layout)


def test_an_image_is_found_that_qemu_knows_by_a_relative_name(directory: Path) -> None:
    """So `nbd-migrate plan` writes it, with an absolute path."""
    files = ("a.raw", "./sub/../sub/b.raw", "../disks/c.raw", "top.qcow2")
    with started(directory, *files) as qemu:
        qemu.wait_for(lambda: listens(directory / "a.qmp"), "its monitor", SECONDS)
        looked_at(
            directory,
            planned(0, directory / "a.raw"),
            planned(1, directory / "sub/b.raw"),
            planned(2, directory.parent / "disks/c.raw"),
            planned(3, directory / "top.qcow2", "qcow2"),
        )


def test_another_image_of_the_same_name_is_not_taken_for_it(directory: Path) -> None:
    other = directory.parent / "elsewhere/a.raw"
    with started(directory, "a.raw") as qemu:
        qemu.wait_for(lambda: listens(directory / "a.qmp"), "its monitor", SECONDS)
        with pytest.raises(UsageError) as caught:
            looked_at(directory, planned(0, other))
    assert str(caught.value) == (
        f"disk.image: A's QEMU, process {qemu.pid}, has not {other} open, but another file of that name; "
        "name that"
    )


def test_what_a_daemon_was_given_is_relative_to_where_it_was_started(directory: Path) -> None:
    program = "import os, signal; os.chdir('/'); signal.pause()"
    shell = 'cd "$1" && exec python3 -c "$2" -daemonize'
    with Process(["bash", "-c", shell, "bash", str(directory), program], directory / "log") as daemon:
        daemon.wait_for(lambda: Path(f"/proc/{daemon.pid}/cwd").resolve() == Path("/"), "it is at /")
        assert find(str(daemon.pid)).directory == str(directory)
