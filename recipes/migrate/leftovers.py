"""What a migration that was given up has made on B, and must not leave there."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.certificates import placing
from recipes.checks.started import started
from recipes.connections.listen import control_of
from recipes.discovery.derive import made_paths
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.images import holds_something
from recipes.hosts.quoting import on_one_line, pasted
from recipes.migrate.state import State
from recipes.plans.channel import SINGLE
from recipes.plans.disks import PlannedDisk
from recipes.plans.plan import Plan
from recipes.plans.sockets import sockets_of_channel
from recipes.qemu import bitmaps, exporter
from recipes.qemu.vm import Vm, VmGoneError


def but(where: str, *left: str) -> str:
    """Return where the guest is, and what is not as it was before, each once."""
    return "; but ".join(dict.fromkeys([where, *left]))


async def any_holds_something(host: Host, state: State) -> bool:
    """Tell whether anything of the guest's disks is in their images on B; raises MigrationError where that is
    not told.

    A block device without an overlay does not tell whether it has the disk, or has never had any of it: the
    former is so only when the guest has come to B.
    """
    plan = state.plan
    for disk in plan.disks:
        is_disk = bool(state.arrived) or not disk.on_device
        if await holds_something(host, disk.target, plan.limits.command, copies=plan.hybrid, is_disk=is_disk):
            return True
    return False


def made(state: State) -> list[PlannedDisk]:
    """Return the disks of which something was made on B, or may have been."""
    return [disk for disk in state.plan.disks if {*disk.beside} & {*state.made}]


def discarding(host: Host, plan: Plan, disk: PlannedDisk) -> list[str]:
    """Return the command for B that removes the image if it holds nothing: it may be the guest's.

    What was copied before the cut-over is A's still.
    """
    copies = ["--copies"] if plan.hybrid else []
    beside = ["--map", disk.map] if disk.on_device else []
    return [host.tool("nbd-overlay"), "discard", *copies, *beside, disk.target]


async def remove_made(host: Host, state: State, limit: float) -> list[str]:
    """Remove what was made on B; return a phrase for the operator when that failed.

    It does not raise: where the guest is does not depend on it.
    """
    left = []
    for disk in made(state):
        kept = await _remove(host, discarding(host, state.plan, disk), limit)
        others = [path for path in (disk.overlay_socket, disk.overlay_monitor) if path in state.made]
        if others and not kept:
            kept = await _remove(host, ["rm", "-f", "--", *others], limit)
        left += kept
    for target in made_flash(state):
        left += await _remove(host, removing_flash(target), limit)
    if state.made and not left:
        left += await remove_dead_sockets(host, state, limit)
    return left


async def remove_dead_sockets(host: Host, state: State, limit: float) -> list[str]:
    """Remove the sockets that a killed QEMU of B has left: of its monitor, of the RAM, of its command line.

    Those on which somebody listens stay, as they are another's. Returns phrases as remove_made().
    """
    sockets = sockets_of_qemu(state.plan)
    try:
        await host.run("sh", "-c", on_one_line(_REMOVE_DEAD), "sh", *sockets, limit=limit)
    except MigrationError as error:
        later = f"nbd-migrate abort {state.name}"
        return [f"sockets of B's QEMU may still be on {host.name} ({error}): when it answers, type: {later}"]
    return []


def sockets_of_qemu(plan: Plan) -> list[str]:
    """Return the absolute paths at which B's QEMU may listen; other files that it makes are among them."""
    kind, _, path = plan.destination.migration.partition(":")
    command = started(plan.destination.qemu).command
    found = made_paths(command, "/") if command else []
    found += [plan.destination.qmp] if plan.destination.qmp.startswith("/") else []
    return [*found, path] if kind == "unix" else found


_REMOVE_DEAD = """
for p; do test -S "$p" || continue;
sed "s/^[^\\/]*//" /proc/net/unix | grep -qxF -- "$p" || rm -f -- "$p"; done
"""
"""Removes sockets to which nobody is bound any more."""


async def remove_channel(host_a: Host, host_b: Host, state: State, limit: float) -> list[str]:
    """Remove from both hosts what disk and RAM have travelled by; return a phrase for each that is left."""
    left = await remove_certificates(host_a, host_b, state, limit)
    return left + await remove_sockets(host_a, host_b, state, limit)


async def remove_sockets(host_a: Host, host_b: Host, state: State, limit: float) -> list[str]:
    """Remove the sockets of a channel, which who was killed has left; return a phrase for each host."""
    left = []
    for host, command in removing_sockets(host_a, host_b, state):
        left += await _remove(host, command, limit)
    return left


def removing_sockets(host_a: Host, host_b: Host, state: State) -> list[tuple[Host, list[str]]]:
    """Return the command for each host that removes the sockets of a tunnel, or of the single channel."""
    if state.tunnel is None:
        return []
    plan = state.plan
    if plan.channel.kind == SINGLE:
        on_a, on_b = [state.tunnel.ram, state.tunnel.monitor], sockets_of_channel(plan)
    else:
        on_a, on_b = (
            [name for path in paths for name in (path, control_of(path))]
            for paths in ((state.tunnel.disk, state.tunnel.ram), plan.ends_on_b)
        )
    return [(host, ["rm", "-f", "--", *paths]) for host, paths in ((host_a, on_a), (host_b, on_b))]


def made_flash(state: State) -> list[str]:
    """Return the files of flash chips that were made on B, or may have been."""
    return [flash.target for flash in state.plan.flash if flash.target in state.made]


def removing_flash(target: str) -> list[str]:
    """Return the command for B that removes one."""
    return ["rm", "-f", "--", target]


async def remove_certificates(host_a: Host, host_b: Host, state: State, limit: float) -> list[str]:
    """Remove the certificates of a migration from both hosts; return a phrase for each that is left."""
    left = []
    for host, directory in certificates_of(host_a, host_b, state):
        try:
            await placing.remove(host, directory, limit)
        except MigrationError as error:
            command = pasted(host.typed(placing.removing(directory)))
            what = f"the keys of this migration are still on {host.name}"
            left.append(f"{what} ({error}): remove them: {command}")
    return left


def certificates_of(host_a: Host, host_b: Host, state: State) -> list[tuple[Host, str]]:
    """Return where they are, or may be."""
    made = state.certificates
    return [] if made is None else [(host_a, made.a), (host_b, made.b)]


async def end_exporter(a: Vm, state: State) -> tuple[list[str], list[str]]:
    """End the NBD server of ours that A's QEMU may have, and our bitmaps, which it may export.

    Returns phrases: what is to be known, what is left. Raises VmGoneError.
    """
    said, left = [], []
    try:
        if state.exporter and (told := await exporter.stop(a)):
            said.append(told)
    except VmGoneError:
        raise
    except MigrationError as error:
        left.append(still_serves(state, str(error)))
    try:
        if state.tracking:
            await bitmaps.remove_all(a, state.tracking.nodes)
    except VmGoneError:
        raise
    except MigrationError as error:
        left.append(still_records(state, str(error)))
    return said, left


def still_serves(state: State, why: str) -> str:
    """Return a phrase for an NBD server of ours that could not be taken away."""
    later = f"nbd-migrate abort {state.name}"
    return f"A's QEMU may still serve its disks in {state.exporter} ({why}): when it answers, type: {later}"


def still_records(state: State, why: str) -> str:
    """Return a phrase for bitmaps of ours that could not be taken away."""
    later = f"nbd-migrate abort {state.name}"
    return f"A's QEMU may still have dirty bitmaps {bitmaps.PREFIX}* ({why}): when it answers, type: {later}"


def not_ended(state: State, why: str) -> list[str]:
    """Return the phrases of end_exporter() for a QEMU that does not answer."""
    exports = [still_serves(state, why)] if state.exporter else []
    return [*exports, still_records(state, why)] if state.tracking else exports


async def remove_exporter(host_a: Host, state: State, limit: float) -> list[str]:
    """Remove the place of that server's socket; return a phrase for the operator when that failed."""
    if state.tracking:
        # One that was killed leaves it.
        left = await _remove(host_a, ["rm", "-f", "--", state.tracking.monitor], limit)
        if left:
            return left
    if not state.exporter:
        return []
    try:
        await exporter.remove_place(host_a, state.exporter, limit)
    except MigrationError as error:
        command = pasted(host_a.typed(exporter.removing_place(state.exporter)))
        return [f"{state.exporter} is still on {host_a.name} ({error}): remove it: {command}"]
    return []


async def _remove(host: Host, argv: Sequence[str], limit: float) -> list[str]:
    try:
        await host.run(*argv, limit=limit)
    except MigrationError as error:
        command = pasted(host.typed(argv))
        return [f"what was made on {host.name} is still there ({error}): remove it: {command}"]
    return []
