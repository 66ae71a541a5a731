"""All that is looked at on both hosts before anything is started."""

from __future__ import annotations

import posixpath
from collections.abc import AsyncIterator, Sequence

from recipes.checks.chains import left_on_a
from recipes.checks.clocks import check_clocks
from recipes.checks.disk_nodes import disk_nodes
from recipes.checks.local_files import check_local
from recipes.checks.machine_types import check_qemu
from recipes.checks.processor import check_processor
from recipes.checks.reachable import check_reachable
from recipes.checks.space import Need, check_space
from recipes.checks.started import started
from recipes.hosts.host import Host
from recipes.plans.plan import Plan
from recipes.qemu.vm import Vm


async def check_hosts(
    plan: Plan, needs: Sequence[Need], a: Vm, host_a: Host, host_b: Host
) -> AsyncIterator[str]:
    """Look at both hosts; yield what may go wrong, a sentence each.

    Raises MigrationError, one line with its remedy, for what cannot go well.
    """
    limit = plan.limits.command
    qemu = started(plan.destination.qemu)
    sockets = [plan.destination.qmp] if plan.destination.qmp.startswith("/") else []
    kind, _, path = plan.destination.migration.partition(":")
    sockets += [path] if kind == "unix" else []
    ours = [disk.directory for disk in plan.disks if disk.on_device]
    sockets = [each for each in sockets if posixpath.dirname(each) not in ours]  # these are made
    for warning in left_on_a(plan, await disk_nodes(plan, a)):
        yield warning
    await check_local(host_b, qemu, sockets, limit, [flash.target for flash in plan.flash])
    await check_reachable(plan, host_a, host_b)
    for warning in await check_qemu(a, host_b, qemu, limit):
        yield warning
    for warning in await check_processor(host_a, host_b, qemu, limit):
        yield warning
    for warning in await check_space(plan, needs, host_b, limit):
        yield warning
    for warning in await check_clocks(host_a, host_b, limit):
        yield warning
