"""Step 1: A serves its disk, and B sees that it is the right one."""

from __future__ import annotations

import json

from recipes.engines.choice import engine_for
from recipes.errors import MigrationError
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase, Role
from recipes.processes.children import Child

SECTOR = 512
"""Bytes of which QEMU's disks are multiples; it rounds a longer file up."""


async def export(m: Migration) -> str:
    """Step 1: serve the source's disk, and see from B that it is the right one."""
    m.enter(Phase.EXPORT)
    server = await start_server(m)
    m.need("the server on A", server.wait())
    await m.during(check_export(m), m.plan.limits.connect, "reaching the export from B")
    return f"{m.plan.source.image} ({m.disk.size} bytes) is {m.plan.export.address}, process {server.pid}"


async def start_server(m: Migration) -> Child:
    """Start nbdserve on A and wait until it is ready."""
    limit = m.plan.limits.start
    server = await m.start(Role.SERVER, await server_command(m), ready=True)
    await m.during(server.ready(limit), limit, "starting the server on A")
    return server


async def server_command(m: Migration) -> list[str]:
    """Return the server's command line, with its pid file where whoever ends it later looks for that."""
    image = m.plan.source.image
    pid_file = f"{await m.place(m.host_a, image, 'nbdserve')}.pid"
    address = m.plan.export.address
    where = ["-b", address.host, "-p", str(address.port)]
    if address.socket:
        # It is on one host with B's QEMU, which may have to connect there again.
        where = ["-k", address.socket, *m.plan.destination.ownership("--socket-")]
    replies = [] if engine_for(m).structured_replies else ["--simple-replies"]
    options = ["-r", "-f", "raw", *replies, "-x", address.export, *where, "--pid-file", pid_file]
    return [m.host_a.tool("nbdserve"), *options, image]


async def check_export(m: Migration) -> None:
    """Refuse an export that B does not reach, that is another disk, or that could make QEMU copy garbage."""
    uri = str(m.plan.export.address)
    answer = await m.host_b.run(*m.host_b.own("probe", uri), limit=m.plan.limits.connect)
    facts = json.loads(answer)
    size = m.disk.size
    if facts["size"] != size and -(-facts["size"] // SECTOR) * SECTOR == size:
        raise MigrationError(
            f"source.image: {m.plan.source.image} has {facts['size']} bytes, no multiple of {SECTOR}; "
            f"lengthen it on A, the guest will not notice: truncate --size {size} {m.plan.source.image}"
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
