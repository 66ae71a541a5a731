"""Steps 1, 2, 3 and 6; step 4 is in cutover.py and step 5 in stream.py.

Each takes the migration as the step before has left it and returns one line about what it has done. A step
that fails raises MigrationError or ConnectError and leaves the clearing up to migrate.py.
"""

from __future__ import annotations

import asyncio
import json

from nbdserve.common.errors import MigrationError
from recipes.hosts.interruption import completed
from recipes.migrate.runtime import Migration
from recipes.plans.plan import Plan
from recipes.processes.children import Child
from recipes.qemu.machine import check_machine
from recipes.qemu.vm import CommandError, Vm
from recipes.steps.causes import WANTED
from recipes.steps.engines import blockdev_options, reached
from recipes.steps.rights import check_rights, explain_start
from recipes.steps.unattended import go_without_guest, told

SECTOR = 512
"""Bytes of which QEMU's disks are multiples; it rounds a longer file up."""


async def export(m: Migration) -> str:
    """Step 1: serve the source's disk, and see from B that it is the right one."""
    m.server = await start_server(m)
    m.need("the server on A", m.server.wait())
    await m.during(check_export(m), m.plan.limits.connect, "reaching the export from B")
    return f"{m.plan.source.image} ({m.size} bytes) is {m.plan.export.address}, process {m.server.pid}"


async def start_server(m: Migration) -> Child:
    """Start nbdserve on A and wait until it is ready."""
    limit = m.plan.limits.start
    server = await m.start(
        "the server on A",
        m.host_a,
        m.plan.source.image,
        "nbdserve",
        await server_command(m),
        ready=True,
    )
    await m.during(server.ready(limit), limit, "starting the server on A")
    return server


async def server_command(m: Migration) -> list[str]:
    """The server's command line, with its pid file where whoever ends it later looks for that."""
    image = m.plan.source.image
    pid_file = f"{await m.place(m.host_a, image, 'nbdserve')}.pid"
    address = m.plan.export.address
    where = ["-b", address.host, "-p", str(address.port)]
    if address.socket:
        # It is on one host with B's QEMU, which may have to connect there again.
        where = ["-k", address.socket, *m.plan.destination.ownership("--socket-")]
    replies = [] if m.engine.structured_replies else ["--simple-replies"]
    options = ["-r", "-f", "raw", *replies, "-x", address.export, *where, "--pid-file", pid_file]
    return [m.host_a.tool("nbdserve"), *options, image]


async def check_export(m: Migration) -> None:
    """Refuse an export that B does not reach, that is another disk, or that could make QEMU copy garbage."""
    uri = str(m.plan.export.address)
    answer = await m.host_b.run(*m.host_b.own("probe", uri), limit=m.plan.limits.connect)
    facts = json.loads(answer)
    if facts["size"] != m.size and -(-facts["size"] // SECTOR) * SECTOR == m.size:
        raise MigrationError(
            f"source.image: {m.plan.source.image} has {facts['size']} bytes, no multiple of {SECTOR}; "
            f"lengthen it on A, the guest will not notice: truncate --size {m.size} {m.plan.source.image}"
        )
    if facts["size"] != m.size:
        raise MigrationError(
            f"{uri} has {facts['size']} bytes, the disk of the guest {m.size}; is it another disk?"
        )
    if facts["structured-replies"] and not m.engine.structured_replies:
        raise MigrationError(
            f"{uri} offers structured replies, with which QEMU stores garbage when the server fails; "
            "serve it with nbdserve --simple-replies"
        )


async def create_overlay(m: Migration) -> str:
    """Step 2: create the image on B whose backing is the export."""
    image, uri, limit = m.plan.destination.image, str(m.plan.export.address), m.plan.limits.start
    tool = m.host_b.tool("nbd-overlay")
    argv = [tool, "create", "--backing", uri, "--size", str(m.size), "--layout", m.engine.layout]
    argv += [*m.plan.destination.ownership("--"), image]

    async def create() -> None:
        # Until it is known whether the image is ours, only one is removed in which nothing is.
        m.remove_later(tool, "discard", image)
        maker = await m.start("nbd-overlay create", m.host_b, image, "overlay", argv)
        try:
            async with asyncio.timeout(limit):
                end = await maker.wait()
        except TimeoutError as error:
            await maker.stop(m.plan.limits.stop)
            raise MigrationError(f"nbd-overlay create on B took longer than {limit:g} s") from error
        if maker.status == 0:
            m.remove_later("rm", "-f", "--", *m.engine.files(m.plan))
        elif maker.status is not None and maker.status > 0:
            # It has refused, or failed and undone what it had done.
            m.remove_later()
        if maker.status:
            raise MigrationError(f"nbd-overlay create on B {end}")

    # To its end in any case, so that nobody has to guess what it has come to.
    await completed(create())
    m.refuse_the_dead()
    return f"{image} over {uri}"


async def launch(m: Migration) -> str:
    """Step 3: start the QEMU on B that waits for the guest."""
    destination, limits = m.plan.destination, m.plan.limits
    await m.engine.prepare(m)
    disk = blockdev_options(m.engine.nodes(m.plan))
    argv = [*destination.qemu, *disk, "-incoming", "defer", "-qmp", monitor_option(destination.qmp)]
    m.qemu = await m.start("B's QEMU", m.host_b, destination.image, "qemu", argv)
    m.need("B's QEMU", m.qemu.wait())
    try:
        m.b = await m.during(reached("B's QEMU", destination.qmp, m.plan), limits.start, "starting B's QEMU")
    except MigrationError as error:
        raise explain_start(m, error) from error
    await m.during(check_device(m.plan, m.b), limits.command, "looking at B's disk")
    await m.during(check_machine(m.a, m.b), limits.command, "comparing B's machine with A's")
    await m.during(check_rights(m), limits.command, "looking at what B's QEMU may do")
    listen = m.b.execute("migrate-incoming", uri=destination.migration)
    await m.during(listen, limits.command, "listening for the RAM")
    return f"process {m.qemu.pid} waits at {destination.migration}"


def monitor_option(address: str) -> str:
    """The value of QEMU's -qmp for a monitor at this address."""
    kind = "unix" if address.startswith("/") else "tcp"
    return f"{kind}:{address.replace(',', ',,')},server=on,wait=off"


async def check_device(plan: Plan, b: Vm) -> None:
    """Insist that B's guest has the disk, and waits when the export is away instead of seeing I/O errors."""
    node = plan.destination.node
    devices = [each for each in await b.execute("query-block") if "qdev" in each]
    using = [each["qdev"] for each in devices if each.get("inserted", {}).get("node-name") == node]
    if not using:
        raise MigrationError(
            f"destination.qemu: no -device has drive={node}, so the guest would have no disk"
        )
    for name in ("rerror", "werror"):
        try:
            action = await b.execute("qom-get", path=using[0], property=name)
        except CommandError as error:
            reason = f"the -device of {node} has no {name}: use virtio-blk, scsi-hd or ide-hd"
            raise MigrationError(f"destination.qemu: {reason}") from error
        if action != "stop":
            reason = (
                f"the -device of {node} has {name}={action}, and an export that is away would be an error"
            )
            raise MigrationError(f"destination.qemu: {reason} in the guest; write rerror=stop,werror=stop")


async def shut_down(m: Migration) -> str:
    """Step 6: close the export, end the server, put the old disk out of reach, take the fence down."""
    await detach(m)
    return await clear_source(m)


async def clear_source(m: Migration) -> str:
    """End what there still is on A, and put its disk out of reach."""
    limits, image, target = m.plan.limits, m.plan.source.image, m.plan.finish.move_aside
    if m.server:
        await m.server.stop(limits.stop)
        if m.server.status:
            m.report.note(f"the server on A {await m.server.wait()}; the disk was complete by then")
    if m.a.connected:
        raise MigrationError(
            f"the disk is complete on B, but A's QEMU does not end; kill it before the fence (process "
            f"{m.fence.pid if m.fence else 'none'} on A) and never let its guest go on"
        )
    if target:
        await move_aside(m, image, target)
    if m.fence:
        await m.fence.stop(limits.stop)
    known = m.guest_end
    await m.guest_has_ended()
    if m.guest_end and not known:
        m.report.note(f"{told(m.guest_end)}; its disk is complete")
    if m.guest_end and not (m.guest_end.good and m.guest_end.reason in ("", *WANTED)):
        raise MigrationError(told(m.guest_end))
    end = f"{image} was moved to {target}" if target else f"{image} is out of date: never start a guest on it"
    return f"the server and A's QEMU have ended; {end}"


async def detach(m: Migration) -> None:
    """Part B's QEMU from all that is not its own file; where it has ended there is nothing to part."""
    try:
        await m.engine.detach(m)
    except MigrationError:
        if not await m.guest_has_ended():
            raise
        await go_without_guest(m)
        await m.engine.detach(m)


async def move_aside(m: Migration, image: str, target: str) -> None:
    """Put A's old disk out of reach; while the fence stands, so that nobody opens it in between."""
    limit = m.plan.limits.command
    if await m.host_a.test("-e", target, limit) and not await m.host_a.test("-e", image, limit):
        return
    await m.host_a.run("mv", "--no-target-directory", "--no-clobber", "--", image, target, limit=limit)
    if await m.host_a.test("-e", image, limit):
        raise MigrationError(f"the disk is complete on B, but {image} on A could not be moved to {target}")
