"""A has come back under another address, while the guest on B needs it: ``resume --source-address``.

What names A by its old address in the plan names the new one from then on. The server on A is started
again there, with certificates for that address; each nbd-overlay is told where it is
(engines/overlay_engine.py), and takes nothing for its backing that is not the same disk. The guest waits
meanwhile, at most.
"""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import replace

from nbdserve.common.errors import UsageError
from nbdserve.common.uri import is_host_name, is_ipv6
from recipes.channel import carriers, keys
from recipes.connections.address import host_and_port, host_in, is_host_and_port, with_host
from recipes.errors import MigrationError
from recipes.migrate.decide import ON_B
from recipes.migrate.journal import Journal
from recipes.migrate.progress import Report
from recipes.migrate.runtime import Migration
from recipes.plans.channel import SINGLE
from recipes.plans.plan import Export, Plan, Source
from recipes.plans.reaching import hosts
from recipes.steps.export import start_server

OPTION = "--source-address"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def at_address(plan: Plan, host: str) -> Plan:
    """Return the plan with A under another name or address. UsageError where nothing in it would change."""
    if not ((_NAME.fullmatch(host) and is_host_name(host)) or is_ipv6(host)):
        raise UsageError(f"{OPTION}: {host!r} is no host: write its name or its address, without a port")
    export, old = plan.export, ""
    if export.address.socket is None:
        if plan.destination.engine == "qemu":
            raise UsageError(
                f"{OPTION}: B's QEMU is connected to A itself (engine qemu), and cannot be told another "
                f"address: give A {export.address.host} back, beside the new one (ip address add)"
            )
        old = export.address.host
        export = Export(str(replace(export.address, host=host)))
    source = _source_at(plan.source, old, host)
    if (export, source) == (plan.export, plan.source) and old != host:
        way = "A connects to B by itself" if plan.channel.kind == SINGLE else "A is reached by no address"
        raise UsageError(f"{OPTION}: nothing in the plan names A's address, as {way}: leave the option out")
    return replace(plan, export=export, source=source)


def _source_at(source: Source, old: str, host: str) -> Source:
    """Return where A's commands and its monitor are; ``old`` is what the export is called, if it is anything.

    Another name than that is one of the operator's ssh configuration, and his to change.
    """
    if source.host and (not old or host_in(source.host) == old):
        source = replace(source, host=with_host(source.host, host))
    if old and is_host_and_port(source.qmp) and host_and_port(source.qmp)[0] == old:
        shown, port = f"[{host}]" if ":" in host else host, host_and_port(source.qmp)[1]
        source = replace(source, qmp=f"{shown}:{port}")
    return source


async def move_source(name: str, host: str, report: Report) -> None:
    """Write down that A is at this name or address now, once commands reach it there.

    Raises JournalBusyError, UsageError, and MigrationError where the guest is not on B or needs A no more.
    """
    with closing(Journal.take_over(name)) as journal:
        state = journal.state
        if state is None or state.phase not in ON_B:
            raise MigrationError(
                f"{name}: {OPTION} is for a guest that is on B while its disk follows: see nbd-migrate "
                f"status {name}"
            )
        plan = at_address(state.plan, host)
        async with hosts(plan) as (a, _):
            await a.run("true", limit=plan.limits.command)
        # A plan's file, of which ``finish`` would be, has the old address.
        journal.append(replace(state, plan=plan, finish=f"nbd-migrate resume {name}"))
    report.note(f"A is at {host} from now on")


async def serve_there(m: Migration) -> None:
    """Have A serve its disks at its new address, and what leads there. Raises MigrationError.

    The single channel's connection is made by A, which makes it again by itself.
    """
    if m.plan.channel.kind == SINGLE:
        return
    stop = m.plan.limits.stop
    for child in (m.server, carriers.process(m)):
        if child is not None and child.running:
            await child.stop(stop)
    await keys.renew(m)
    await carriers.stand(m)
    await start_server(m)
