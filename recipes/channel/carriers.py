"""What carries disk and RAM between sockets of the two hosts: ssh's tunnel, or the single channel.

Where neither is the channel, nothing here does anything.
"""

from __future__ import annotations

from recipes.channel import single, ssh
from recipes.hosts.host import Host
from recipes.migrate.leftovers import remove_sockets
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Role
from recipes.plans.channel import SINGLE, SSH
from recipes.plans.plan import Plan
from recipes.plans.sockets import sockets_of_channel
from recipes.processes.children import Child

ROLES = (Role.TUNNEL, Role.CHANNEL)
"""Of the process that carries beside A's server, of which a migration has one at most."""


async def paths(plan: Plan, host_a: Host) -> tuple[list[str], list[str]]:
    """Return the sockets that are going to be made on A and on B. Raises as ssh.paths()."""
    if plan.channel.kind == SSH:
        return await ssh.paths(plan, host_a), [plan.ends_on_b[0]]
    if plan.channel.kind == SINGLE:
        return await single.paths_on_a(plan, host_a), sockets_of_channel(plan)
    return [], []


async def prepare(m: Migration) -> None:
    """Do what is to be done before A's server is started. Raises MigrationError."""
    await ssh.prepare(m)
    await single.prepare(m)


async def stand(m: Migration) -> None:
    """See that all is there that carries, beside A's server. Raises MigrationError."""
    await ssh.stand(m)
    await single.stand(m)


def process(m: Migration) -> Child | None:
    """Return the process that carries beside A's server, if there is one."""
    return next((child for role in ROLES if (child := m.child(role))), None)


def ram_uri(m: Migration) -> str:
    """Return where A's QEMU sends its guest."""
    return f"unix:{m.state.tunnel.ram}" if m.state.tunnel else m.plan.destination.migration


async def end(m: Migration) -> None:
    """Nothing is carried any more: end who did, and remove the sockets. What is left is told."""
    if child := process(m):
        await child.stop(m.plan.limits.stop)
    left = await remove_sockets(m.host_a, m.host_b, m.state, m.plan.limits.command)
    for each in left:
        m.report.note(f"{each}; or later: nbd-migrate abort {m.state.name}")
    if not left and m.state.tunnel:
        m.record(tunnel=None)
