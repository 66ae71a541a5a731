"""The two hosts of a plan, and the monitors of its guest."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from recipes.connections import installed
from recipes.connections.address import ssh_words
from recipes.connections.monitors import MonitorAt, monitor_of
from recipes.connections.sharing import sharing
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.plans.plan import Destination, Plan, Source, way_to
from recipes.qemu.vm import Vm, connect


@asynccontextmanager
async def hosts(plan: Plan, control: str = "") -> AsyncIterator[tuple[Host, Host]]:
    """Give hosts A and B, whose ssh asks nothing and waits for a limited time.

    One connection to each is shared as long as the block lasts; ``control`` is the directory of those of a
    process that was killed (Host.control).
    """
    # Less than the limit of a command, so that ssh itself says what it waited for.
    limit = plan.limits.command * 2 / 3
    a = await host_of("A", plan.source).prepared(limit)
    b = await host_of("B", plan.destination).prepared(limit)
    async with sharing(a, b, directory=control) as (a, b):
        yield a, b


async def find_commands(plan: Plan, a: Host, b: Host, *, sure: bool = True) -> tuple[Plan, tuple[Host, Host]]:
    """Return the plan with where our commands are on those hosts that have an address, and the hosts.

    Raises HostError where one cannot be reached, MigrationError where it does not have them; unless ``sure``,
    they are looked for on its PATH then.
    """
    found, limit = [], plan.limits.command
    for host, section in ((a, "source"), (b, "destination")):
        found.append(host.bin)
        if not host.address or host.bin:
            continue
        try:
            found[-1] = await installed.find_commands(host, f"{section}.bin", limit)
        except MigrationError:
            if sure:
                raise
    source, destination = replace(plan.source, bin=found[0]), replace(plan.destination, bin=found[1])
    there = replace(plan, source=source, destination=destination)
    return there, (replace(a, bin=found[0]), replace(b, bin=found[1]))


@asynccontextmanager
async def looked_at(a: str, b: str, limit: float) -> AsyncIterator[tuple[Host, Host]]:
    """Give hosts A and B by their addresses (empty: this machine), before there is a plan.

    Each command there may take ``limit`` seconds. Raises as find_commands().
    """
    made = [
        await Host(name, ("ssh", *ssh_words(address)) if address else (), "", address).prepared(limit * 2 / 3)
        for name, address in (("A", a), ("B", b))
    ]
    async with sharing(*made) as shared:
        found = []
        for host, section in zip(shared, ("source", "destination"), strict=True):
            key = f"{section}.bin of a plan"
            there = await installed.find_commands(host, key, limit) if host.address else ""
            found.append(replace(host, bin=there))
            if host.address:
                await installed.check_version(found[-1], limit)
        yield found[0], found[1]


def host_of(name: str, there: Source | Destination) -> Host:
    """Return the host of one side of a plan."""
    return Host(name, way_to(there), there.bin, there.host)


def monitor_a(plan: Plan, host: Host) -> MonitorAt:
    """Return where the monitor of A's QEMU is."""
    return monitor_of(host, plan.source.qmp)


def monitor_b(plan: Plan, host: Host) -> MonitorAt:
    """Return where the monitor of B's QEMU is."""
    return monitor_of(host, plan.destination.qmp)


async def source_monitor(plan: Plan, host: Host) -> Vm:
    """Return a connection to A's QEMU. Raises ConnectError."""
    limits = plan.limits
    where = monitor_a(plan, host)
    return await connect("A's QEMU", where, limit=limits.connect, command_limit=limits.command)
