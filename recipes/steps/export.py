"""Step 1: A serves its disks, and B sees that they are the right ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from nbdserve.common.uri import NbdUri
from overlay.formats.device.map_place import is_among_devices
from recipes.channel import carriers, keys, plain, single, source_server, ssh, through_qemu, tls
from recipes.engines.choice import engine_for
from recipes.engines.devices import make_places
from recipes.errors import MigrationError
from recipes.fencing.source_images import images_on_a
from recipes.hosts.quoting import listed
from recipes.migrate.runtime import Migration
from recipes.migrate.state import Phase, Role
from recipes.plans.channel import SINGLE
from recipes.plans.disks import PlannedDisk
from recipes.processes.children import Child
from recipes.qemu.images import RAW
from recipes.qemu.vm import CommandError

SECTOR = 512
"""Bytes of which QEMU's disks are multiples; it rounds a longer file up."""


async def export(m: Migration) -> str:
    """Step 1: serve the source's disks, and see from B that they are the right ones."""
    m.enter(Phase.EXPORT)
    await make_places(m.host_b, m.plan)
    server = await start_server(m)
    m.need("the server on A", server.wait())
    await carriers.stand(m)
    await check_exports(m, m.disks)
    are = "are" if len(m.disks) > 1 else "is"
    disks = listed(f"{disk.image} ({m.state.disk(disk).size} bytes)" for disk in m.disks)
    exports = listed(str(m.plan.export_of(disk)) for disk in m.disks)
    return f"{disks} {are} {exports}, process {server.pid}"


async def start_server(m: Migration) -> Child:
    """Start nbdserve on A and wait until it is ready."""
    await keys.make(m)
    await carriers.prepare(m)
    if m.plan.through_qemu and not m.arrived:
        await through_qemu.serve(m)
    limit = m.plan.limits.start
    server = await m.start(Role.SERVER, await server_command(m), ready=True)
    await m.during(server.ready(limit), limit, "starting the server on A")
    return server


async def serve_files(m: Migration) -> bool:
    """A's QEMU has given its disks up: from now on they are served from their files, so that it may end.

    Who reads them waits meanwhile, as when the server has died. Where that fails, A's QEMU serves them as
    before, if it can; each is told. Returns whether it may end.
    """
    if not (m.state.exporter and m.plan.through_qemu) or m.complete:
        return True
    try:
        await _replace_server(m, from_qemu=False)
        return True
    except MigrationError as error:
        m.report.note(f"A's disks cannot be served from their files: {error}")
    try:
        if m.a.connected:
            await _replace_server(m, from_qemu=True)
    except MigrationError as error:
        m.report.note(f"A's QEMU cannot serve them either: {error}")
    return m.server is None or not m.server.running


async def _replace_server(m: Migration, *, from_qemu: bool) -> None:
    """End the server, and start another; whatever else has ended, B's QEMU too.

    One that is an end of the single channel stays, and with it the connection: only its exports are others.
    """
    limits = m.plan.limits
    if m.plan.channel.kind == SINGLE and m.server and m.server.running:
        await _replace_exports(m, from_qemu=from_qemu)
        return
    if m.server:
        await m.server.stop(limits.stop)
    server = await m.start(Role.SERVER, await server_command(m, from_qemu=from_qemu), ready=True)
    await server.ready(limits.start)


async def _replace_exports(m: Migration, *, from_qemu: bool) -> None:
    """Have the server serve the same disks from elsewhere: their clients are cut off, and connect again."""
    async with source_server.monitor(m) as server:
        for disk, image in zip(m.disks, await images_on_a(m, m.disks), strict=True):
            if disk.format == RAW:
                continue
            name = m.plan.export_of(disk).export
            with suppress(CommandError):
                await server.execute("block-export-del", id=name, mode="hard")
            given = {"type": "nbd", "id": name, "name": name}
            if from_qemu:
                given |= {"filename": str(through_qemu.uri_of(m, disk))}
            else:
                given |= {"filename": image, "format": disk.format}
            await server.call("block-export-add", given)


async def server_command(m: Migration, *, from_qemu: bool | None = None, writable: bool = False) -> list[str]:
    """Return the server's command line, with its pid file where whoever ends it later looks for that.

    ``from_qemu``: disks that A's QEMU has to serve are read from there; so it is until the cut-over.
    ``writable``: what B has is going to be written to them; not by the single channel.
    """
    is_end = m.plan.channel.kind == SINGLE
    pid_file = f"{await m.place(m.host_a, m.disks[0].image, 'nbdserve')}.pid"
    replies = [] if engine_for(m).structured_replies else ["--simple-replies"]
    hashes = ["--block-hashes"] if m.plan.tells_hashes and not writable else []
    # Until the guest has gone its bitmaps are passed on.
    told = is_end or (m.plan.hybrid and not m.arrived)
    control = ["--qmp", f"unix:{await source_server.monitor_path(m)}"] if told else []
    head = await single.server_words(m) if is_end else ["-r"] if not writable else []
    where = [] if is_end else await _listening(m)
    options = [*replies, *hashes, *where, *control, "--pid-file", pid_file]
    by_qemu = not m.arrived if from_qemu is None else from_qemu
    sources = [through_qemu.uri_of(m, disk) if by_qemu and disk.format != RAW else None for disk in m.disks]
    images = await images_on_a(m, m.disks)
    if len(m.disks) == 1 and not is_end:
        name = m.plan.export.address.export
        of_file = ["-f", m.disks[0].format, "-x", name, *options, images[0]]
        if part_of(m, m.disks[0]):
            of_file = [*options, "--export", export_option(m, m.disks[0], images[0])]
        what = of_file if sources[0] is None else ["-x", name, *options, str(sources[0])]
    else:
        found = zip(m.disks, images, sources, strict=True)
        what = [*options, *(word for each in found for word in ("--export", export_option(m, *each)))]
    return [m.host_a.tool("nbdserve"), *head, *what]


async def _listening(m: Migration) -> list[str]:
    """Return the words that say where the server listens, and who is let in there."""
    address = m.plan.export.address
    secure = [*tls.server_options(m), *await plain.server_options(m)]
    if tunnelled := ssh.server_socket(m):
        return ["-k", tunnelled, *secure]
    if address.socket:
        # It is on one host with B's QEMU, which may have to connect there again.
        return ["-k", address.socket, *m.plan.destination.ownership("--socket-"), *secure]
    return ["-b", address.host, "-p", str(address.port), *secure]


def export_option(m: Migration, disk: PlannedDisk, image: str, uri: NbdUri | None = None) -> str:
    """Return what nbdserve's --export is told of a disk: of its file, or of what A's QEMU serves at a URI."""
    name = m.plan.export_of(disk).export.replace("=", "==")
    if uri is not None:
        return f"{name}={str(uri).replace(',', ',,')}"
    return f"{name}={image.replace(',', ',,')},format={disk.format}{part_of(m, disk)}"


def part_of(m: Migration, disk: PlannedDisk) -> str:
    """Return the option that serves no more of a block device than is the guest's disk; it may be larger."""
    is_device = is_among_devices(disk.image) and disk.format == RAW
    return f",size={m.state.disk(disk).size}" if is_device else ""


async def check_exports(m: Migration, disks: Sequence[PlannedDisk]) -> None:
    """Check the exports of these disks, each in its time."""
    for disk in disks:
        checking = check_export(m, disk)
        await m.during(checking, m.plan.limits.connect, f"reaching the export{m.about(disk)} from B")


async def check_export(m: Migration, disk: PlannedDisk) -> None:
    """Refuse an export that B does not reach, that is another disk, or that could make QEMU copy garbage."""
    uri = str(m.plan.export_of(disk))
    probe = m.host_b.own("probe", str(tls.disk_uri(m, disk)))
    facts = await m.host_b.told(*probe, limit=m.plan.limits.connect)
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
