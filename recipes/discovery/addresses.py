"""Where the two hosts of a migration reach each other: A's server for B, and B's QEMU for A."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from nbdserve.common.errors import UsageError
from nbdserve.common.socket_paths import SOCKET_PATH_LIMIT
from nbdserve.common.uri import NbdUri, is_ipv6
from recipes.connections.address import is_host_and_port
from recipes.errors import MigrationError
from recipes.hosts.host import Host

EXPORT_PORT = 10809
MIGRATION_PORT = 4444

LIMIT = 30.0
"""Seconds for one question to a host."""


@dataclass(frozen=True)
class Addresses:
    """The URI of what A serves, and where B's QEMU waits for the RAM."""

    export: str
    migration: str


async def addresses(to: str, host_a: Host, host_b: Host, *, beside: str) -> Addresses:
    """Find them; on one machine they are Unix sockets beside a disk of B.

    ``to`` is what the operator has said of B where that has no address for ssh. Raises MigrationError where
    one host has no way to the other.
    """
    if not to and not host_a.address and not host_b.address:
        return sockets(beside)
    if is_host_and_port(to):
        b, _, said = to.rpartition(":")
        b = b.strip("[]")
    else:
        b, said = to or await _address_of_b(host_a, host_b), ""
    here = await _route(host_a, b, EXPORT_PORT)
    port = int(said) if said else (await _route(host_b, here["address"], MIGRATION_PORT))["port"]
    export = NbdUri(host=here["address"], port=here["port"], export="disk")
    return Addresses(str(export), f"tcp:{in_brackets(b)}:{port}")


async def _address_of_b(host_a: Host, host_b: Host) -> str:
    """Return the address of B: that at which ssh reaches it, or which it has towards A."""
    if host_b.address:
        return await _reached_at(host_b)
    return str((await _route(host_b, await _reached_at(host_a), MIGRATION_PORT))["address"])


async def _reached_at(host: Host) -> str:
    """Return the address of a host at which ssh reaches it."""
    words = (await host.run("printenv", "SSH_CONNECTION", limit=LIMIT)).split()
    if len(words) != 4:
        raise MigrationError(
            f"{host.name} does not tell at which address ssh reaches it ($SSH_CONNECTION); write a plan "
            "by hand"
        )
    return words[2]


def sockets(beside: str) -> Addresses:
    """Return sockets on B beside a disk. Raises UsageError where their paths are too long for that."""
    socket = f"{beside}.export"
    if len(os.fsencode(socket)) > SOCKET_PATH_LIMIT:
        raise UsageError(f"{socket} is too long for a socket: give --to-dir DIR with a shorter path")
    return Addresses(str(NbdUri(socket=socket, export="disk")), f"unix:{beside}.ram")


async def _route(host: Host, other: str, port: int) -> dict[str, Any]:
    return await host.told(*host.own("route", other, str(port)), limit=LIMIT)


def in_brackets(address: str) -> str:
    """Return the address of a host as it stands before a port: an IPv6 one in brackets."""
    return f"[{address}]" if is_ipv6(address) else address
