"""What is checked before anything is started, each with one clear line."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import PurePosixPath

from nbdserve.common.errors import ConnectError, UsageError
from nbdserve.common.sizes import format_size
from recipes.channel import carriers
from recipes.checks.chains import IDENTITIES, check_chains, held
from recipes.checks.disk_nodes import DiskNode, check_given_up, check_open, check_recorded, disk_nodes
from recipes.checks.other_media import check_flash, check_same
from recipes.checks.space import Need, beside, shortages
from recipes.connections.installed import check_version
from recipes.connections.monitors import MonitorAt
from recipes.engines.choice import engine_of
from recipes.engines.devices import check_devices
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.places import KEYS, NBD_SERVER, left_beside
from recipes.hosts.quoting import pasted
from recipes.plans.by_hand import cancelling
from recipes.plans.channel import SSH
from recipes.plans.disks import away
from recipes.plans.hooks import Hooks
from recipes.plans.plan import Plan, Source
from recipes.plans.reaching import monitor_b
from recipes.qemu.devices import check_jobs
from recipes.qemu.exporter import require_none
from recipes.qemu.images import RAW
from recipes.qemu.source import HOLDS, UNDER_WAY, migration_status
from recipes.qemu.vm import Vm, connect, is_somebody


async def check(plan: Plan, a: Vm, host_a: Host, host_b: Host) -> tuple[tuple[int, ...], list[str]]:
    """Check the hosts and the running guest; return the sizes of its disks in bytes, and what is to be told.

    Raises UsageError when the plan does not fit what is found, MigrationError when something is missing.
    """
    await check_guest(a, plan.source)
    await check_jobs(a)
    nodes = await disk_nodes(plan, a)
    check_hooks(plan.hooks)
    await check_tools(plan, host_a, host_b)
    await check_marks(plan, host_a, [disk.image for disk in plan.disks], "image")
    await check_away(plan, host_a)
    await check_open(plan, nodes, host_a)
    told = await check_given_up(plan, nodes, a)
    await check_served(plan, nodes, a, host_a)
    await check_same(plan, host_a, host_b)
    await check_flash(plan, a, host_b)
    await check_apart(plan, host_a, [disk.image for disk in plan.disks], "image")
    sizes = tuple(node.size for node in nodes)
    await check_marks(plan, host_b, [disk.target for disk in plan.disks], "target")
    told += await check_targets(plan, sizes, host_b)
    await check_apart(plan, host_b, [disk.target for disk in plan.disks], "target")
    await check_private(plan, host_a, host_b)
    await check_space(plan, sizes, host_a, host_b)
    await check_carrier(plan, host_a, host_b)
    where = monitor_b(plan, host_b)
    if await answers(where, plan.limits.connect):
        raise MigrationError(
            f"destination.qmp: something answers at {where} already; end it or choose another"
        )
    if plan.finish.move_aside:
        await check_moves(plan, host_a)
    return sizes, told


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
        for program in await host.lacking([*programs, host.own("supervisor")[0]], limit):
            raise MigrationError(f"there is no {program} on {host.name}; install it there")
        if host.remote:
            await check_version(host, limit)


async def check_marks(plan: Plan, host: Host, images: Sequence[str], key: str) -> None:
    """No image may be one, or take the place of one, whose guest has moved to another host."""
    for why in (await host.told(*host.own("marks", *images), limit=plan.limits.command)).values():
        raise MigrationError(f"{plan.called(key)}: {why}")


async def check_away(plan: Plan, host_a: Host) -> None:
    """Where A's images go when their guest has left nothing may be; block devices stay."""
    places = [place for disk in plan.disks if (place := away(disk.image))]
    for path in await in_the_way(host_a, places, plan.limits.command):
        raise MigrationError(
            f"{plan.called('image')}: {path} exists on A, where the image goes when its guest has left: "
            "rename or remove it"
        )


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


async def check_private(plan: Plan, host_a: Host, host_b: Host) -> None:
    """No directory of somebody else's may be where keys, or the socket of A's NBD server, will be."""
    keys = [KEYS] if plan.has_secrets else []
    servers = [NBD_SERVER] if plan.through_qemu or plan.hybrid else []
    first, limit = plan.disks[0], plan.limits.command
    on_a = await left_beside(host_a, first.image, keys + servers, limit) if keys + servers else []
    on_b = await in_the_way(host_b, [f"{first.stem}{each}" for each in keys], limit)
    for host, paths in ((host_a, on_a), (host_b, on_b)):
        for path in paths:
            removing = pasted(host.typed(["rm", "-r", "--", path]))
            raise MigrationError(
                f"{path} exists on {host.name}, where this migration keeps what is secret; remove it, if it "
                f"is left from another one: {removing}"
            )


async def check_space(plan: Plan, sizes: Sequence[int], host_a: Host, host_b: Host) -> None:
    """What A's images hold now must have room on B, with what is made beside them there.

    How much a block device holds is not known.
    """
    limit = plan.limits.command
    images = [disk.image for disk in plan.disks]
    told = await host_a.run("stat", "-L", "--format=%b %B", "--", *images, limit=limit)
    needs = [each for disk, size in zip(plan.disks, sizes, strict=True) for each in beside(plan, disk, size)]
    for disk, said in zip(plan.disks, told.splitlines(), strict=True):
        if disk.on_device:
            continue
        blocks, block = said.split()
        of_file = int(blocks) * int(block)
        needs.append(Need(disk.target, of_file if disk.format == RAW else await held(plan, disk, host_a)))
    if short := await shortages(needs, host_b, limit):
        where = "; ".join(
            f"{each.directory} needs {format_size(each.needed)} at least, and {format_size(each.free)} "
            "are left"
            for each in short
        )
        raise MigrationError(f"{plan.called('target')}: on B {where}; make room")


def check_hooks(hooks: Hooks) -> None:
    """What is called while the migration runs must be there."""
    for each in fields(hooks):
        command = hooks.command(each.name)
        if command and shutil.which(command[0]) is None:
            raise UsageError(f"hooks.{each.name}: there is no program {command[0]} on this host")


async def check_carrier(plan: Plan, host_a: Host, host_b: Host) -> None:
    """Where it makes sockets nothing may be."""
    limit = plan.limits.command
    on_a, on_b = await carriers.paths(plan, host_a)
    what = "the tunnel" if plan.channel.kind == SSH else "the channel"
    for host, paths in ((host_a, on_a), (host_b, on_b)):
        for path in await in_the_way(host, paths, limit):
            raise MigrationError(
                f"channel.kind: {path} exists on {host.name}, where {what} has a socket; remove it, if "
                "it is nobody's any more"
            )


async def check_targets(plan: Plan, sizes: Sequence[int], host_b: Host) -> list[str]:
    """Nothing of what is made on B may be there, but for block devices that are as large as their disks.

    Returns what is to be told of these.
    """
    limit, key = plan.limits.command, plan.called("target")
    told = await check_devices(plan, sizes, host_b)
    files = [disk.target for disk in plan.disks if not disk.on_device]
    parents = [("-d", str(PurePosixPath(file).parent)) for file in files]
    answers = await host_b.tests([*parents, *(("-b", file) for file in files)], limit) if files else []
    for file, is_there, is_device in zip(files, answers[: len(files)], answers[len(files) :], strict=True):
        if not is_there:
            raise MigrationError(f"{key}: there is no directory for {file} on B")
        if is_device:
            raise MigrationError(f"{key}: {file} is a block device on B; name it by its path below /dev")
    engine = engine_of(plan)
    made = {path: disk for disk in plan.disks for path in engine.files(disk)}
    paths = [path for path, disk in made.items() if not (disk.on_device and path == disk.target)]
    for path in await in_the_way(host_b, paths, limit):
        disk, tool = made[path], host_b.tool("nbd-overlay")
        map_ = ["--map", disk.map] if disk.on_device else []
        discard = pasted(host_b.typed([tool, "discard", *map_, disk.target]))
        raise MigrationError(
            f"{key}: {path} exists on B; remove it if it is left from an interrupted run, an "
            f"overlay that holds nothing, and no other, with: {discard}"
        )
    return told


async def in_the_way(host: Host, paths: Sequence[str], limit: float) -> list[str]:
    """Return at which of these something is. A socket on which nobody listens is as good as none: it is
    replaced.
    """
    if not paths:
        return []
    dead = 'test -S "$p" && ! grep -qF -- " $p" /proc/net/unix'
    there = 'test -e "$p" || test -L "$p"'
    script = f"for p; do if {dead}; then echo no; elif {there}; then echo yes; else echo no; fi; done"
    said = (await host.run("sh", "-c", script, "sh", *paths, limit=limit)).split()
    return [path for path, answer in zip(paths, said, strict=True) if answer == "yes"]


async def check_moves(plan: Plan, host_a: Host) -> None:
    """The images' new places must be free, and on the same file system, so that moving is one instant."""
    limit, key = plan.limits.command, "finish.move_aside"
    moves = [(disk.image, plan.moved_to(disk)) for disk in plan.disks]
    directories = [str(PurePosixPath(target).parent) for _, target in moves]
    asked = [
        each
        for (image, target), directory in zip(moves, directories, strict=True)
        for each in (("-b", image), ("-e", target), ("-d", directory))
    ]
    answers = iter(await host_a.tests(asked, limit))
    for (image, target), directory in zip(moves, directories, strict=True):
        is_device, is_taken, is_there = next(answers), next(answers), next(answers)
        if is_device:
            raise MigrationError(f"{key}: {image} is a block device on A, which stays; leave it out")
        if is_taken:
            raise MigrationError(f"{key}: {target} exists on A; choose another name")
        if not is_there:
            raise MigrationError(f"{key}: there is no directory {directory} on A")
    images = [image for image, _ in moves]
    paths = [path for pair in zip(images, directories, strict=True) for path in pair]
    systems = (await host_a.run("stat", "--format=%d", "--", *paths, limit=limit)).split()
    for (image, target), here, there in zip(moves, systems[::2], systems[1::2], strict=True):
        if here != there:
            raise MigrationError(
                f"{key}: {target} is on another file system than {image}; choose one on the same"
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
