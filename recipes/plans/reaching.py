"""The two hosts of a plan, as its prefixes lead to them, and the monitor of its guest."""

from __future__ import annotations

from recipes.hosts.host import Host
from recipes.plans.plan import Plan
from recipes.qemu.vm import Vm, connect


async def hosts(plan: Plan) -> tuple[Host, Host]:
    """Return hosts A and B, whose ssh asks nothing and waits for a limited time."""
    source, destination, limit = plan.source, plan.destination, plan.limits.command
    a, b = Host("A", source.shell, source.bin), Host("B", destination.shell, destination.bin)
    # Less than the limit of a command, so that ssh itself says what it waited for.
    return await a.prepared(limit * 2 / 3), await b.prepared(limit * 2 / 3)


async def source_monitor(plan: Plan) -> Vm:
    """Return a connection to A's QEMU. Raises ConnectError."""
    limits = plan.limits
    return await connect("A's QEMU", plan.source.qmp, limit=limits.connect, command_limit=limits.command)
