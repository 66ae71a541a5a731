"""Look at a running guest, and make a plan of it. Nothing is changed, on neither host."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nbdserve.common.errors import ConnectError, UsageError
from nbdserve.common.socket_paths import SOCKET_PATH_LIMIT
from recipes.connections.monitors import monitor_of
from recipes.discovery import guest as guests
from recipes.discovery.addresses import addresses, sockets
from recipes.discovery.command_line import config_file
from recipes.discovery.command_line.chardevs import Monitor, monitors
from recipes.discovery.command_line.options import CommandLine, parse
from recipes.discovery.derive import Derived, derive, made_paths
from recipes.discovery.document import Draft, Place
from recipes.discovery.managed import busy
from recipes.discovery.naming import names
from recipes.discovery.process import Process
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.plans.channel import SINGLE, SSH
from recipes.plans.disks import stem_of
from recipes.plans.seeds import seeds_of
from recipes.qemu.images import RAW
from recipes.qemu.vm import Vm, connect, nobody_listens

CONNECT = 15.0
"""Seconds until a monitor answers."""

COMMAND = 30.0
"""Seconds for one command on a host, or of a monitor."""


@dataclass(frozen=True)
class Wanted:
    """What the operator has said.

    source    the guest: the address of its monitor, or the id of its process
    to        B: ssh://..., or an address of this machine (HOST or HOST:PORT), or nothing: this machine
    to_dir    the directory of B's disks; empty: as on A
    export    where A serves the disks; empty: as B reaches A
    channel   how disk and RAM get there; empty: as a plan has it that does not say
    targets   where disks end on B, [NODE=]PATH each; the others as to_dir says
    """

    source: str
    to: str = ""
    to_dir: str = ""
    export: str = ""
    channel: str = ""
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Running:
    """A guest that was found; ``address`` is that of its monitor, and ``monitor`` what made that."""

    process: Process
    command: CommandLine
    guest: guests.Guest
    address: str
    monitor: Monitor | None


async def discover(wanted: Wanted, host_a: Host, host_b: Host) -> Draft:
    """Find out what there is to know for a plan.

    Raises UsageError, ConnectError or MigrationError, one line, for what is not understood, cannot be moved,
    or cannot be found.
    """
    running = await find(wanted.source, host_a)
    derived = await derived_for(running, host_b, wanted.to_dir)
    refuse(running.guest, derived)
    said = seeds_of(wanted.targets, [(disk.drive, disk.node) for disk in derived.disks], "--target")
    targets = tuple(
        said.get(number) or target_of(disk.image, disk.format, wanted.to_dir)
        for number, disk in enumerate(derived.disks)
    )
    await refuse_same(derived, targets, host_a, host_b)
    address = "" if host_b.address else wanted.to
    if wanted.channel == SSH:
        # Neither host has to reach the other.
        there = sockets(stem_of(targets[0]))
    else:
        there = await addresses(address, host_a, host_b, beside=stem_of(targets[0]))
    if wanted.channel == SINGLE:
        # All goes to where B waits for the RAM.
        there = replace(there, export=sockets(stem_of(targets[0])).export)
    return Draft(
        guest=running.guest,
        pid=running.process.pid,
        user=running.process.user,
        derived=derived,
        source=Place(host_a.address, running.address),
        destination=Place(host_b.address, await monitor_on_b(running, host_b, targets[0])),
        targets=targets,
        export=wanted.export or there.export,
        migration=there.migration,
        channel=wanted.channel,
    )


async def find(source: str, host_a: Host) -> Running:
    """Find the guest, by its monitor or its process id."""
    process = Process(**await host_a.told(*host_a.own("process", source), limit=COMMAND))
    command = understood(process)
    vm, address = await reached(source, process, command, host_a)
    try:
        guest = await guests.look(vm)
    finally:
        await vm.disconnect()
    monitor = next((each for each in monitors(command) if place_of(each, process) == address), None)
    return Running(process, command, guest, address, monitor)


def understood(process: Process) -> CommandLine:
    """Take the command line of a process apart, with the files that it has read."""
    try:
        command = parse(process.argv)
        for option in command.named("readconfig"):
            name = option.value or ""
            command = command.replaced(option, config_file.parse(process.configs[name], name))
        return command.settled()
    except UsageError as error:
        raise UsageError(f"the command line of process {process.pid} is not understood: {error}") from error


def place_of(monitor: Monitor, process: Process) -> str:
    """Return where a monitor listens, an absolute path or HOST:PORT; nothing if it does not."""
    where = monitor.device.listens
    if where.startswith("@"):
        # In the abstract namespace, where we do not look.
        return ""
    if not where or not monitor.device.path:
        host, _, port = where.rpartition(":")
        return f"{host or '127.0.0.1'}:{port}" if where else ""
    return posixpath.normpath(posixpath.join(process.directory, where))


async def reached(source: str, process: Process, command: CommandLine, host_a: Host) -> tuple[Vm, str]:
    """Connect to the monitor that was named, or to the first that answers of those of a process."""
    named = [] if source.isdecimal() else [source]
    places = named or [where for each in monitors(command) if (where := place_of(each, process))]
    for address in places:
        try:
            at = monitor_of(host_a, address)
            vm = await connect("A's QEMU", at, limit=CONNECT, command_limit=COMMAND)
        except ConnectError as error:
            if nobody_listens(error) and address == places[-1]:
                raise
            continue
        return vm, address
    name = command.last("name").split(",")[0].removeprefix("guest=") or f"of process {process.pid}"
    raise ConnectError(busy(command, name))


async def derived_for(running: Running, host_b: Host, to_dir: str) -> Derived:
    """Derive B's command line, with other names for what B has already."""
    command, directory = running.command, running.process.directory
    made = made_paths(command, directory)
    return derive(
        command,
        running.guest,
        directory,
        address=running.address,
        monitor=running.monitor,
        names=names(made, await existing(host_b, made)),
        target=lambda image, form: target_of(image, form, to_dir),
    )


async def existing(host: Host, paths: Sequence[str]) -> list[str]:
    """Return which of these paths are there."""
    script = 'for path; do if test -e "$path" || test -L "$path"; then echo yes; else echo no; fi; done'
    answers = (await host.run("sh", "-c", script, "sh", *paths, limit=COMMAND)).split() if paths else []
    return [path for path, answer in zip(paths, answers, strict=True) if answer == "yes"]


def refuse(guest: guests.Guest, derived: Derived) -> None:
    """Raise MigrationError where the guest cannot be moved."""
    reasons = list(derived.refused)
    if not reasons and not derived.disks:
        reasons.append("it has no disk that could move; a guest without one needs no nbd-migrate")
    if reasons:
        raise MigrationError(f"the guest {guest.name or 'on A'} cannot be moved: {'; and '.join(reasons)}")


def target_of(image: str, form: str, directory: str) -> str:
    """Return where a file of A's ends on B, by a name that says nothing else than what it is there: raw."""
    suffix = f".{form}"
    if form != RAW and image.endswith(suffix):
        image = f"{image.removesuffix(suffix)}.{RAW}"
    return posixpath.join(directory, posixpath.basename(image)) if directory else image


async def refuse_same(derived: Derived, targets: Sequence[str], host_a: Host, host_b: Host) -> None:
    """Raise UsageError where a disk would end in the file that it is in."""
    pairs = [(disk.image, target, "disk") for disk, target in zip(derived.disks, targets, strict=True)]
    pairs += [(flash.image, flash.target, "flash chip") for flash in derived.flash]
    for image, target, what in pairs:
        here, there = await identity(host_a, image), await identity(host_b, target)
        if there and here == there:
            raise UsageError(
                f"{target} is the {what}'s own file on A, as B sees it too: give --to-dir DIR, or --target"
            )


async def identity(host: Host, path: str) -> str:
    """Return what tells a file from all others of all hosts; nothing where there is none."""
    script = 'test -e "$1" && cat /proc/sys/kernel/random/boot_id && stat -L --format=%d:%i -- "$1"; true'
    return await host.run("sh", "-c", script, "sh", path, limit=COMMAND)


async def monitor_on_b(running: Running, host_b: Host, target: str) -> str:
    """Return where the monitor of B's QEMU is: as on A, if that is a socket's path and B has none there."""
    address = running.address if running.address.startswith("/") else f"{stem_of(target)}.monitor"
    found = names([address], await existing(host_b, [address]))
    made = found.get(address, address)
    if len(os.fsencode(made)) > SOCKET_PATH_LIMIT:
        raise UsageError(
            f"{made} is too long for a socket; start the guest with a shorter path for its monitor"
        )
    return made
