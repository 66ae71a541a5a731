"""A plan whose channel is ssh: nobody listens at a port, so it names sockets, whatever it named before."""

from __future__ import annotations

from dataclasses import replace

from nbdserve.common.socket_paths import check_socket_path
from nbdserve.common.uri import NbdUri
from recipes.connections.listen import control_of
from recipes.plans.plan import Export, Plan


def between_sockets(plan: Plan) -> Plan:
    """Return the plan with sockets on B, beside its first image, in the place of addresses of TCP.

    Raises UsageError where their paths are too long for sockets.
    """
    address, there = plan.export.address, plan.destination
    beside = plan.disks[0].stem
    check_socket_path(control_of(f"{beside}.export"), plan.called("target"))
    if address.socket is None:
        uri = str(NbdUri(socket=f"{beside}.export", export=address.export))
        plan = replace(plan, export=Export(uri))
    if there.migration.startswith("tcp:"):
        plan = replace(plan, destination=replace(there, migration=f"unix:{beside}.ram"))
    return plan
