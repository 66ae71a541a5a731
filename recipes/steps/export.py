"""Step 1: A serves its disks, and B sees that they are the right ones."""

from __future__ import annotations

import json
from collections.abc import Sequence

from recipes.channel import plain, ssh, tls
from recipes.engines.choice import engine_for
from recipes.errors import MigrationError
from recipes.hosts.quoting import listed
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase, Role
from recipes.plans.disks import PlannedDisk
from recipes.processes.children import Child

SECTOR = 512
"""Bytes of which QEMU's disks are multiples; it rounds a longer file up."""


async def export(m: Migration) -> str:
    """Step 1: serve the source's disks, and see from B that they are the right ones."""
    m.enter(Phase.EXPORT)
    server = await start_server(m)
    m.need("the server on A", server.wait())
    await ssh.stand(m)
    await check_exports(m, m.disks)
    are = "are" if len(m.disks) > 1 else "is"
    disks = listed(f"{disk.image} ({m.state.disk(disk).size} bytes)" for disk in m.disks)
    exports = listed(str(m.plan.export_of(disk)) for disk in m.disks)
    return f"{disks} {are} {exports}, process {server.pid}"


async def start_server(m: Migration) -> Child:
    """Start nbdserve on A and wait until it is ready."""
    limit = m.plan.limits.start
    await tls.make_certificates(m)
    await ssh.prepare(m)
    server = await m.start(Role.SERVER, await server_command(m), ready=True)
    await m.during(server.ready(limit), limit, "starting the server on A")
    return server


async def server_command(m: Migration) -> list[str]:
    """Return the server's command line, with its pid file where whoever ends it later looks for that."""
    pid_file = f"{await m.place(m.host_a, m.disks[0].image, 'nbdserve')}.pid"
    address = m.plan.export.address
    where = ["-b", address.host, "-p", str(address.port)]
    if tunnelled := ssh.server_socket(m):
        where = ["-k", tunnelled]
    elif address.socket:
        # It is on one host with B's QEMU, which may have to connect there again.
        where = ["-k", address.socket, *m.plan.destination.ownership("--socket-")]
    replies = [] if engine_for(m).structured_replies else ["--simple-replies"]
    secure = [*tls.server_options(m), *await plain.server_options(m)]
    options = [*replies, *where, *secure, "--pid-file", pid_file]
    if len(m.disks) == 1:
        what = ["-f", "raw", "-x", address.export, *options, m.disks[0].image]
    else:
        what = [*options, *(word for disk in m.disks for word in ("--export", export_option(m, disk)))]
    return [m.host_a.tool("nbdserve"), "-r", *what]


def export_option(m: Migration, disk: PlannedDisk) -> str:
    """Return what nbdserve's --export is told of a disk."""
    name, image = m.plan.export_of(disk).export.replace("=", "=="), disk.image.replace(",", ",,")
    return f"{name}={image},format=raw"


async def check_exports(m: Migration, disks: Sequence[PlannedDisk]) -> None:
    """Check the exports of these disks, each in its time."""
    for disk in disks:
        checking = check_export(m, disk)
        await m.during(checking, m.plan.limits.connect, f"reaching the export{m.about(disk)} from B")


async def check_export(m: Migration, disk: PlannedDisk) -> None:
    """Refuse an export that B does not reach, that is another disk, or that could make QEMU copy garbage."""
    uri = str(m.plan.export_of(disk))
    probe = m.host_b.own("probe", str(tls.disk_uri(m, disk)))
    answer = await m.host_b.run(*probe, limit=m.plan.limits.connect)
    facts = json.loads(answer)
    size = m.state.disk(disk).size
    if facts["size"] != size and -(-facts["size"] // SECTOR) * SECTOR == size:
        raise MigrationError(
            f"{m.plan.called('image')}: {disk.image} has {facts['size']} bytes, no multiple of {SECTOR}; "
            f"lengthen it on A, the guest will not notice: truncate --size {size} {disk.image}"
        )
    if facts["size"] != size:
        raise MigrationError(
            f"{uri} has {facts['size']} bytes, the disk of the guest {size}; is it another disk?"
        )
    if facts["structured-replies"] and not engine_for(m).structured_replies:
        raise MigrationError(
            f"{uri} offers structured replies, with which QEMU stores garbage when the server fails; "
            "serve it with nbdserve --simple-replies"
        )
