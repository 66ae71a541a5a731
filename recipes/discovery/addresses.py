"""Where the two hosts of a migration reach each other: A's server for B, and B's QEMU for A."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from nbdserve.common.errors import UsageError
from nbdserve.common.socket_paths import SOCKET_PATH_LIMIT
from nbdserve.common.uri import NbdUri, is_ipv6
from recipes.hosts.host import Host
from recipes.plans.plan import is_host_and_port

EXPORT_PORT = 10809
MIGRATION_PORT = 4444

LIMIT = 15.0
"""Seconds for one question to a host."""


@dataclass(frozen=True)
class Addresses:
    """The URI of what A serves, and where B's QEMU waits for the RAM."""

    export: str
    migration: str


async def addresses(to: str, host_a: Host, host_b: Host, *, beside: str) -> Addresses:
    """Find them; on one machine they are Unix sockets beside a disk of B.

    Raises MigrationError where one host has no way to the other.
    """
    if not to:
        return _sockets(beside)
    address, _, port = to.rpartition(":") if is_host_and_port(to) else (to, "", str(MIGRATION_PORT))
    address = address.strip("[]")
    here = await _route(host_a, address, EXPORT_PORT)
    export = NbdUri(host=here["address"], port=here["port"], export="disk")
    return Addresses(str(export), f"tcp:{_in_brackets(address)}:{port}")


def _sockets(beside: str) -> Addresses:
    socket = f"{beside}.export"
    if len(os.fsencode(socket)) > SOCKET_PATH_LIMIT:
        raise UsageError(f"{socket} is too long for a socket: give --to-dir DIR with a shorter path")
    return Addresses(str(NbdUri(socket=socket, export="disk")), f"unix:{beside}.ram")


async def _route(host: Host, other: str, port: int) -> dict[str, Any]:
    answer = await host.run(*host.own("route", other, str(port)), limit=LIMIT)
    return dict(json.loads(answer))


def _in_brackets(address: str) -> str:
    return f"[{address}]" if is_ipv6(address) else address
