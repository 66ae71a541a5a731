"""A Linux on host A, with disks of one kind, that is to move to host B: both are reached by ssh alone.

The disks hold what is computed again in the end (recipes/demo/disk.py), in one of these forms on A:

    raw      files
    device   block devices
    qcow2    files
    chain    qcow2 files over a qcow2 base, whose first chunks are not those that the guest sees
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from recipes.demo.disk import CHUNK
from recipes.demo.guest import Guest
from tests.support.apart import ADDRESSES, LONG, Network, network, operator, server
from tests.support.guests import short_directory
from tests.support.linux_disks import SIZES, LinuxDisk, LinuxDisks
from tests.support.loops import loop_device
from tests.support.processes import Process, check
from tests.support.vms import NBD_MIGRATE, stopped_with

FORMS = ("raw", "device", "qcow2", "chain")
CHANGED = range(2, 5)
"""Chunks of a disk that its base does not have as the guest sees them."""

WRITE = 600.0
"""Seconds in which the guest must have written some records more."""

HOST = {host: f"ssh://root@{address}" for host, address in ADDRESSES.items()}


class MatrixGuest(LinuxDisks):
    """The guest; it may move more than once, and each time its disks lie in another directory."""

    def __init__(self, directory: Path, net: Network, runtime: Path, form: str, disks: int) -> None:
        super().__init__(directory, sizes=SIZES[:disks])
        self.net = net
        self.runtime = runtime
        self.format = "qcow2" if form in ("qcow2", "chain") else "raw"
        self.moves = 0

    def give_form(self, form: str, stack: ExitStack) -> None:
        """Have the disks on A in this form; what has to be undone is left to the stack."""
        for number, each in enumerate(self.disks):
            if form == "device":
                image = stack.enter_context(loop_device(each.image))
            elif form == "raw":
                image = each.image
            else:
                image = as_qcow2(each, chain=form == "chain")
            self.disks[number] = replace(each, image=image)

    def started_with(self, option: str) -> list[str]:
        """A's command line, whose disks are each a -drive or a -blockdev."""
        words = [*self.guest_on_a.qemu, "-qmp", f"unix:{self.monitor_a},server=on,wait=off"]
        for each in self.disks:
            file = "host_device" if each.image.is_block_device() else "file"
            node = {
                "driver": self.format,
                "node-name": each.drive,
                "file": {"driver": file, "filename": str(each.image)},
            }
            drive = f"if=none,id={each.drive},format={self.format},file={each.image}"
            words += ["-blockdev", json.dumps(node)] if option == "-blockdev" else ["-drive", drive]
        return words

    def guest_on(self, host: str) -> Guest:
        """The machine that the guest runs in on host ``a`` or ``b``; both have one file system."""
        name = self.directory / {"a": "a", "b": "a.moved"}[host]
        console, control = (name.with_name(f"{name.name}.{what}") for what in ("console", "control"))
        return replace(self.guest_on_a, console=console, control=control)

    def monitor_on(self, host: str) -> Path:
        """Its QEMU's monitor there."""
        return self.directory / {"a": "a.qmp", "b": "a.moved.qmp"}[host]

    def move(self, origin: str, to: str, *options: str, source: str = "") -> str:
        """Move the guest without a plan's file into another directory; return what was said."""
        directory = self.directory / f"disks{self.moves + 1}"
        directory.mkdir()
        said = self.run_between(origin, to, "--to-dir", str(directory), *options, source=source)
        self.disks = [moved(each, directory) for each in self.disks]
        return said

    def run_between(self, origin: str, to: str, *options: str, source: str = "") -> str:
        """Have an orchestrator on a third host move the guest as these options say; return what it said."""
        self.moves += 1
        words = ("--source", source or str(self.monitor_on(origin)), "--from", HOST[origin], "--to", HOST[to])
        argv = self.net.on("c", str(NBD_MIGRATE), "run", *words, *options)
        environment = {"PATH": f"{self.directory}:{os.environ['PATH']}", "XDG_RUNTIME_DIR": str(self.runtime)}
        with Process(argv, self.directory / f"run{self.moves}.log", env=environment) as run:
            assert run.wait(LONG) == 0, run.output()
            said = run.output()
        self.guest_on_b = self.guest_on(to)
        return said

    def works(self) -> None:
        """The guest has written since it came."""
        asyncio.run(self.guest_on_b.reach(self.guest_on_b.announced + 48, WRITE))


def moved(disk: LinuxDisk, directory: Path) -> LinuxDisk:
    """The disk as it is after a move into this directory, where nothing else is left but what was told."""
    [target] = [each for each in directory.glob(f"{disk.image.stem}*") if each.suffix != ".log"]
    return replace(disk, image=target, target=target)


def as_qcow2(disk: LinuxDisk, *, chain: bool) -> Path:
    """Write the disk's original content as a qcow2 image, with a base if it is to be a chain."""
    top = disk.image.with_suffix(".qcow2")
    convert = ("qemu-img", "convert", "-f", "raw", "-O", "qcow2")
    if not chain:
        check(*convert, disk.image, top)
        return top
    base = disk.image.with_suffix(".base")
    with disk.image.open("r+b") as file:
        for index in CHANGED:
            file.seek(index * CHUNK)
            file.write(b"\xa5" * CHUNK)
    check(*convert, disk.image, base)
    check("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    seen = disk.image.with_suffix(".seen")
    for index in CHANGED:
        seen.write_bytes(disk.original.chunk(index))
        check("qemu-io", "-f", "qcow2", "-c", f"write -s {seen} {index * CHUNK} {CHUNK}", top)
    return top


@contextmanager
def guest_on_a(
    form: str, disks: int, started_by: str, *lines: str, options: Sequence[str] = ()
) -> Iterator[MatrixGuest]:
    """The guest, that runs on A and writes; ``lines`` are more ones of both hosts' sshd_config, ``options``
    those of its QEMU.

    Whatever of it is left in the end is killed.
    """
    with ExitStack() as stack:
        net = stack.enter_context(network())
        directory = stack.enter_context(short_directory())
        operator(directory)
        for host in ("a", "b"):
            stack.enter_context(server(directory, net, host, lines))
        made = MatrixGuest(directory, net, stack.enter_context(short_directory()), form, disks)
        made.give_form(form, stack)
        argv = net.on("a", *made.started_with(started_by), *options)
        machine = stack.enter_context(Process(argv, directory / "a.log"))
        stack.enter_context(stopped_with(made))
        machine.wait_for(lambda: made.guest_on_a.ready, "the guest finds its disks", seconds=60)
        asyncio.run(made.guest_on_a.reach(48, WRITE))
        yield made
