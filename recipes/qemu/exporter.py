"""The NBD server of a QEMU that runs: what it has open, on a Unix socket of its host, for reading only.

    await require_none(vm)                   refuse a QEMU that has an NBD server already; nothing is changed
    await start(vm, "/run/x/nbd")            have it listen there
    await add(vm, NodeExport("disk0", "node0", bitmaps=("b0",)))
    await remove(vm, "disk0")                its clients are cut off
    await stop(vm)                           and all that is gone; also where there is none

A QEMU has one NBD server. Whoever starts it writes down first that there is one (``State.exporter``), and
whatever ends the migration takes it away again: steps use channel/through_qemu.py, which does the one and has
migrate/leftovers.py do the other.

Measured on 7.2 and 10.0 (tests/vm/test_exporter.py):

- a bitmap that records cannot be exported (``Enabled bitmap ... incompatible with readonly export``): begin
  another and disable this one first, in one transaction;
- one that is exported is in use: it cannot be removed, merged into or enabled until its export is removed;
- an export lives through the cut-over. One that clients may write to makes the migration fail;
- a server that cannot listen leaves none behind, and one that ends removes its socket.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from dataclasses import dataclass

from nbdserve.common.uri import NbdUri
from recipes.errors import MigrationError
from recipes.hosts import places
from recipes.hosts.host import Host
from recipes.qemu.vm import CommandError, Vm

PREFIX = "nbd-migrate-"
"""How the ids of our exports begin."""

LOOK = 0.05
"""Seconds between two looks at an export that goes."""

SOCKET = "nbd"
"""What the socket is called in a directory that has nothing else, and that nobody else can enter."""

_PLACE = f"""{places.making([SOCKET])} if test -n "$2"; then chown -- "$2" .; fi"""
"""Makes the directory $1 for the user $2, or for whoever runs this."""

_NOWHERE = "/dev/null/nbd"
"""Where nobody can listen."""

_RUNNING = "already running"
"""In what QEMU says when it has an NBD server."""


@dataclass(frozen=True)
class NodeExport:
    """A block node of a QEMU as an export that is read only.

    name     of the export: letters, digits and ._- that begin with a letter
    node     the block node's name
    bitmaps  dirty bitmaps of that node, or of one below it, that clients can ask for as
             ``qemu:dirty-bitmap:NAME``; none of them may still record
    """

    name: str
    node: str
    bitmaps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", self.name), self.name

    @property
    def id(self) -> str:
        """Return what QEMU calls the export."""
        return PREFIX + self.name

    def uri(self, socket: str) -> NbdUri:
        """Return where it is found on the host of a QEMU that listens at this socket."""
        return NbdUri(socket=socket, export=self.name)


async def require_none(vm: Vm) -> None:
    """Raise MigrationError for a QEMU that has an NBD server, which it tells only who wants one."""
    try:
        await _listen(vm, _NOWHERE)
    except CommandError as error:
        if _RUNNING in error.reason:
            raise _has_one(vm) from error


async def start(vm: Vm, socket: str) -> None:
    """Have a QEMU listen at a Unix socket, an absolute path on its host.

    Raises MigrationError where it has an NBD server already, or cannot listen there.
    """
    try:
        await _listen(vm, socket)
    except CommandError as error:
        if _RUNNING in error.reason:
            raise _has_one(vm) from error
        raise MigrationError(f"{vm.name} cannot serve its disks at {socket}: {error.reason}") from error


async def add(vm: Vm, export: NodeExport) -> None:
    """Export a node. Raises CommandError, as for a bitmap that records, or a name that is taken."""
    given: dict[str, object] = {"type": "nbd", "id": export.id, "node-name": export.node, "name": export.name}
    if export.bitmaps:
        given["bitmaps"] = list(export.bitmaps)
    await vm.call("block-export-add", {**given, "writable": False})


async def remove(vm: Vm, name: str) -> None:
    """Remove an export, whoever is connected to it, and wait until it is gone; it may not be there.

    Then its bitmaps are free. Raises as Vm.execute() does; the time limit is the caller's.
    """
    wanted = PREFIX + name
    if wanted not in await _ids(vm):
        return
    with suppress(CommandError):
        # It may go by itself.
        await vm.execute("block-export-del", id=wanted, mode="hard")
    while wanted in await _ids(vm):
        await asyncio.sleep(LOOK)


async def stop(vm: Vm) -> str:
    """End the server with all its exports; there may be none.

    Where somebody else has exports there, too, only ours are removed, and a phrase says so. Raises as
    Vm.execute() does.
    """
    found = await _ids(vm)
    others = sorted(each for each in found if not each.startswith(PREFIX))
    if others:
        for each in found - {*others}:
            await remove(vm, each.removeprefix(PREFIX))
        return (
            f"{vm.name} has an NBD server with exports of somebody else ({', '.join(others)}), which was "
            "left running (nbd-server-stop ends it)"
        )
    with suppress(CommandError):
        # There is none.
        await vm.execute("nbd-server-stop")
    return ""


async def place(host: Host, directory: str, owner: str, limit: float) -> str:
    """Make the directory for the socket, and return the socket's path.

    ``owner`` is who the QEMU runs as; empty: who runs commands there. Raises as Host.run() does.
    """
    await host.run("sh", "-c", _PLACE, "sh", directory, owner, limit=limit)
    return f"{directory}/{SOCKET}"


async def remove_place(host: Host, directory: str, limit: float) -> None:
    """Remove the directory with its socket; it may not be there. Raises as Host.run() does."""
    await host.run("sh", "-c", places.removing([SOCKET]), "sh", directory, limit=limit)


def removing_place(directory: str) -> list[str]:
    """Return the command for the host that removes it, for an operator."""
    return ["rm", "-r", "--", directory]


async def _listen(vm: Vm, socket: str) -> None:
    await vm.call("nbd-server-start", {"addr": {"type": "unix", "data": {"path": socket}}})


async def _ids(vm: Vm) -> set[str]:
    """Return the ids of all that a QEMU exports by NBD."""
    return {each["id"] for each in await vm.execute("query-block-exports") if each["type"] == "nbd"}


def _has_one(vm: Vm) -> MigrationError:
    return MigrationError(
        f"{vm.name} has an NBD server already, and can have only one; when nobody needs that: nbd-server-stop"
    )
