"""What is checked before anything is started, each with one clear line."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import PurePosixPath

from nbdserve.common.errors import ConnectError, UsageError
from nbdserve.common.sizes import format_size
from recipes.channel import ssh
from recipes.checks.chains import IDENTITIES, check_chains, held
from recipes.checks.disk_nodes import DiskNode, check_open, check_recorded, disk_nodes
from recipes.checks.other_media import check_flash, check_same
from recipes.checks.space import Need, shortages
from recipes.connections.installed import check_version
from recipes.connections.monitors import MonitorAt
from recipes.engines.choice import engine_of
from recipes.engines.devices import check_device
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import pasted
from recipes.plans.by_hand import cancelling
from recipes.plans.disks import PlannedDisk
from recipes.plans.hooks import Hooks
from recipes.plans.plan import Plan, Source
from recipes.plans.reaching import monitor_b
from recipes.qemu.devices import check_jobs
from recipes.qemu.exporter import require_none
from recipes.qemu.images import RAW
from recipes.qemu.source import HOLDS, UNDER_WAY, migration_status
from recipes.qemu.vm import Vm, connect, is_somebody


async def check(plan: Plan, a: Vm, host_a: Host, host_b: Host) -> tuple[int, ...]:
    """Check the hosts and the running guest; return the sizes of its disks in bytes.

    Raises UsageError when the plan does not fit what is found, MigrationError when something is missing.
    """
    await check_guest(a, plan.source)
    await check_jobs(a)
    nodes = await disk_nodes(plan, a)
    check_hooks(plan.hooks)
    await check_tools(plan, host_a, host_b)
    await check_open(plan, nodes, host_a)
    await check_served(plan, nodes, a, host_a)
    await check_same(plan, host_a, host_b)
    await check_flash(plan, a, host_b)
    await check_apart(plan, host_a, [disk.image for disk in plan.disks], "image")
    for disk, node in zip(plan.disks, nodes, strict=True):
        await check_target(plan, disk, node.size, host_b)
    await check_apart(plan, host_b, [disk.target for disk in plan.disks], "target")
    await check_space(plan, host_a, host_b)
    await check_tunnel(plan, host_a, host_b)
    where = monitor_b(plan, host_b)
    if await answers(where, plan.limits.connect):
        raise MigrationError(
            f"destination.qmp: something answers at {where} already; end it or choose another"
        )
    if plan.finish.move_aside:
        for disk in plan.disks:
            await check_move(plan, disk, host_a)
    return tuple(node.size for node in nodes)


async def check_served(plan: Plan, nodes: Sequence[DiskNode], a: Vm, host_a: Host) -> None:
    """What A's QEMU has to serve, disks or bitmaps of them, it must be able to serve."""
    if plan.through_qemu:
        await check_chains(plan, nodes, host_a)
    if plan.hybrid:
        await check_recorded(nodes, a)
    if plan.through_qemu or plan.hybrid:
        await require_none(a)


async def check_guest(a: Vm, source: Source) -> None:
    """The guest must be running, and not be migrating."""
    status = await a.execute("query-status")
    if await migration_status(a) == HOLDS:
        raise MigrationError(
            "the guest on A stands still before the switch-over of a migration that nobody continues; it "
            f"goes on with: {cancelling(source)}"
        )
    if not status["running"]:
        raise MigrationError(
            f"the guest on A does not run, it is in state {status['status']}; start it first"
        )
    if await migration_status(a) in UNDER_WAY:
        raise MigrationError(
            "the guest on A is migrating already; wait for that, or cancel it (migrate_cancel)"
        )


async def check_tools(plan: Plan, host_a: Host, host_b: Host) -> None:
    """What is started there must exist, and be of this version."""
    limit = plan.limits.command
    for host, programs in (
        (host_a, [host_a.tool("nbdserve")]),
        (host_b, [host_b.tool("nbd-overlay"), plan.destination.qemu[0]]),
    ):
        for program in (*programs, host.own("supervisor")[0]):
            if not await host.has(program, limit):
                raise MigrationError(f"there is no {program} on {host.name}; install it there")
        if host.remote:
            await check_version(host, limit)


async def check_apart(plan: Plan, host: Host, paths: Sequence[str], key: str) -> None:
    """No two disks may be one, whatever links lead there."""
    if len(paths) == 1:
        return
    found = (await host.run("sh", "-c", IDENTITIES, "sh", *paths, limit=plan.limits.command)).splitlines()
    for number, identity in enumerate(found):
        if identity in found[:number]:
            other = paths[found.index(identity)]
            raise MigrationError(
                f"{plan.called(key)}: {other} and {paths[number]} are the same on {host.name}"
            )


async def check_space(plan: Plan, host_a: Host, host_b: Host) -> None:
    """What A's images hold now must have room on B; of a block device it is not known how much that is."""
    limit = plan.limits.command
    images = [disk.image for disk in plan.disks]
    told = await host_a.run("stat", "-L", "--format=%b %B", "--", *images, limit=limit)
    needs = []
    for disk, said in zip(plan.disks, told.splitlines(), strict=True):
        if disk.on_device:
            continue
        blocks, block = said.split()
        of_file = int(blocks) * int(block)
        needs.append(Need(disk.target, of_file if disk.format == RAW else await held(plan, disk, host_a)))
    for short in await shortages(needs, host_b, limit):
        raise MigrationError(
            f"{plan.called('target')}: {format_size(short.free)} are left in {short.directory} on B, and "
            f"A's images hold {format_size(short.needed)} at least; make room"
        )


def check_hooks(hooks: Hooks) -> None:
    """What is called while the migration runs must be there."""
    for each in fields(hooks):
        command = hooks.command(each.name)
        if command and shutil.which(command[0]) is None:
            raise UsageError(f"hooks.{each.name}: there is no program {command[0]} on this host")


async def check_tunnel(plan: Plan, host_a: Host, host_b: Host) -> None:
    """Where it makes sockets nothing may be."""
    limit, on_a = plan.limits.command, await ssh.paths(plan, host_a)
    on_b = [plan.ends_on_b[0]] if on_a else []
    for host, path in [(host_a, each) for each in on_a] + [(host_b, each) for each in on_b]:
        if await in_the_way(host, path, limit):
            raise MigrationError(
                f"channel.kind: {path} exists on {host.name}, where the tunnel has a socket; remove it, if "
                "it is nobody's any more"
            )


async def check_target(plan: Plan, disk: PlannedDisk, size: int, host_b: Host) -> None:
    """Nothing of what is made on B may be there, but for a block device of ``size`` bytes at least."""
    image, key = disk.target, plan.called("target")
    limit, beside = plan.limits.command, engine_of(plan).files(disk)
    if disk.on_device:
        await check_device(plan, disk, size, host_b)
        beside.remove(image)
    elif not await host_b.test("-d", str(PurePosixPath(image).parent), limit):
        raise MigrationError(f"{key}: there is no directory for {image} on B")
    elif await host_b.test("-b", image, limit):
        raise MigrationError(f"{key}: {image} is a block device on B; name it by its path below /dev")
    for path in beside:
        if await in_the_way(host_b, path, limit):
            tool = host_b.tool("nbd-overlay")
            discard = pasted(
                host_b.typed([tool, "discard", *(["--map", disk.map] if disk.on_device else []), image])
            )
            raise MigrationError(
                f"{key}: {path} exists on B; remove it if it is left from an interrupted run, an "
                f"overlay that holds nothing, and no other, with: {discard}"
            )


async def in_the_way(host: Host, path: str, limit: float) -> bool:
    """Tell whether something is there. A socket on which nobody listens is as good as none: it is
    replaced.
    """
    dead = 'test -S "$1" && ! grep -qF -- " $1" /proc/net/unix'
    script = f'if {dead}; then echo no; elif test -e "$1" || test -L "$1"; then echo yes; else echo no; fi'
    return (await host.run("sh", "-c", script, "sh", path, limit=limit)).strip() == "yes"


async def check_move(plan: Plan, disk: PlannedDisk, host_a: Host) -> None:
    """The image's new place must be free, and on the same file system, so that moving is one instant."""
    image, target = disk.image, plan.moved_to(disk)
    limit = plan.limits.command
    if await host_a.test("-b", image, limit):
        raise MigrationError(f"finish.move_aside: {image} is a block device on A, which stays; leave it out")
    if await host_a.test("-e", target, limit):
        raise MigrationError(f"finish.move_aside: {target} exists on A; choose another name")
    directory = str(PurePosixPath(target).parent)
    if not await host_a.test("-d", directory, limit):
        raise MigrationError(f"finish.move_aside: there is no directory {directory} on A")
    devices = await host_a.run("stat", "--format=%d", "--", image, directory, limit=limit)
    if len(set(devices.split())) != 1:
        raise MigrationError(
            f"finish.move_aside: {target} is on another file system than {image}; choose one on the same"
        )


async def answers(where: MonitorAt | str, limit: float) -> bool:
    """Tell whether a monitor, or anything else, accepts connections there."""
    try:
        vm = await connect("", where, limit=limit, command_limit=limit)
    except ConnectError as error:
        # Somebody who accepts but says nothing is somebody, too.
        return is_somebody(error)
    await vm.disconnect()
    return True
