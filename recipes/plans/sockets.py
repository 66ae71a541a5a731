"""A plan whose channel leads from socket to socket, as ssh or the single one, whatever addresses it named."""

from __future__ import annotations

from dataclasses import replace

from nbdserve.common.errors import UsageError
from nbdserve.common.socket_paths import check_socket_path
from nbdserve.common.uri import NbdUri
from recipes.connections.listen import control_of
from recipes.plans.channel import SINGLE
from recipes.plans.plan import Export, Plan


def between_sockets(plan: Plan) -> Plan:
    """Return the plan with sockets on B, beside its first image, in the place of addresses of TCP.

    Raises UsageError where their paths are too long for sockets, or where two addresses are said to be that
    of the single channel.
    """
    if plan.channel.kind == SINGLE:
        plan = _with_address(plan)
    address, there = plan.export.address, plan.destination
    beside = plan.disks[0].stem
    longest = monitor_on_b(plan) if plan.channel.kind == SINGLE else control_of(f"{beside}.export")
    check_socket_path(longest, plan.called("target"))
    if address.socket is None:
        uri = str(NbdUri(socket=f"{beside}.export", export=address.export))
        plan = replace(plan, export=Export(uri))
    if there.migration.startswith("tcp:"):
        plan = replace(plan, destination=replace(there, migration=f"unix:{beside}.ram"))
    return plan


def monitor_on_b(plan: Plan) -> str:
    """Return the socket of the monitor of the single channel's end on B."""
    return f"{plan.disks[0].stem}.channel.qmp"


def sockets_of_channel(plan: Plan) -> list[str]:
    """Return the sockets that the single channel's end on B makes."""
    listens = [plan.way_to_b.removeprefix("unix:")] if plan.way_to_b.startswith("unix:") else []
    return [plan.ends_on_b[0], monitor_on_b(plan), *listens]


def _with_address(plan: Plan) -> Plan:
    """Return the plan with where B listens for the single channel: where it would have for the RAM.

    Where that is a socket this is one, too; the RAM's is the one of B's QEMU.
    """
    said, there = plan.channel.address, plan.destination.migration
    over_network = there.startswith("tcp:")
    if said and over_network and said != there:
        raise UsageError(
            f"channel.address: destination.migration says {there}, where B would listen, too; leave one out"
        )
    address = said or (there if over_network else f"unix:{plan.disks[0].stem}.channel")
    return replace(plan, channel=replace(plan.channel, address=address))
