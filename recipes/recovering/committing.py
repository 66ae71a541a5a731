"""What a guest wrote on B, whose QEMU is lost, is brought to A's images: ``nbd-overlay commit`` does it.

1. The overlays, which nobody streams into any more, are looked at: from here on there is only this way.
   The journal says so; whatever had either end of the disks open is ended: nbd-overlay, the fence, A's
   server, and A's QEMU, from which the guest has gone.
2. A's server serves the images for writing, where they are out of reach (recipes/fencing/), by the channel of
   the migration. Their markers, and their first bytes (nbdserve/exports/half_committed.py), say from then on
   that they are no disks.
3. ``nbd-overlay commit`` runs on B, or on A where the overlays were copied there, for all disks at once.
4. The journal says that A has the guest's disks; they have their names back, and what was there for the
   migration is ended and removed.

Killed at any instant, the same is done again.
"""

from __future__ import annotations

import time

from nbdserve.common.uri import NbdUri
from nbdserve.exports.moved_images import Standing
from recipes.channel import carriers, keys, through_qemu, tls
from recipes.engines.choice import engine_for
from recipes.errors import MigrationError
from recipes.fencing.source_images import give_back, images_on_a, put_away
from recipes.hosts.host import Host
from recipes.hosts.images import image_facts
from recipes.hosts.places import beside
from recipes.hosts.quoting import listed, pasted
from recipes.migrate.runtime import READY, Migration
from recipes.migrate.state import Phase, Role
from recipes.plans.channel import SINGLE
from recipes.processes.children import Child
from recipes.recovering.lost_places import make_lost
from recipes.steps.cutover import end_source
from recipes.steps.export import export_option, server_command

SOCKET = ".commit"
"""How the socket ends, beside the first image on A, at which copies of overlays are committed."""


async def commit(m: Migration, copies: str, *, b_is_off: bool) -> None:
    """Bring what the guest wrote on B to A's images. ``copies`` is a directory on A with the overlays.

    Raises MigrationError, whose line says what to do.
    """
    refuse_what_cannot_be(m, copies)
    if m.state.phase is not Phase.RECOVERING:
        await refuse_what_is_no_overlay(m, copies, b_is_off=b_is_off)
    # Whoever was to see the guest arrive may have died before.
    m.enter(Phase.RECOVERING, made=(), arrived=m.state.arrived or time.time())
    images = listed(disk.image for disk in m.disks)
    m.report.note(f"what the guest wrote on B is written to {images} on A, no disk until that has ended")
    try:
        await end_users(m, b_is_off=b_is_off)
        await put_away(m, Standing.COMMITTING)
        host, overlays, places = await serve(m, copies)
        words = [word for pair in zip(overlays, places, strict=True) for word in pair]
        committing = await start(m, host, [host.tool("nbd-overlay"), "commit", *words])
        end = await committing.wait()
        # Of one whose supervisor was killed nobody knows how it ended.
        if committing.status != 0:
            raise MigrationError(f"nbd-overlay commit on {host.name} {end}")
    except MigrationError as error:
        raise MigrationError(f"{error}; see to that, then: {again(m, copies, b_is_off)}") from error
    m.enter(Phase.RECOVERED)


def again(m: Migration, copies: str, b_is_off: bool) -> str:
    """Return what is typed to go on."""
    words = ["nbd-migrate", "recover", m.state.name, "--on", "a"]
    words += ["--from", copies] if copies else []
    return pasted([*words, "--b-is-off"] if b_is_off else words)


def refuse_what_cannot_be(m: Migration, copies: str) -> None:
    """Raise MigrationError where nbd-overlay cannot do it, or not in this way."""
    plan = m.plan
    if engine_for(m).layout != "flat":
        raise MigrationError(
            f"the disk on B is a QED image, which does not say what the guest wrote: nbd-migrate recover "
            f"{m.state.name} --on b; or qemu-img commit, by hand"
        )
    if plan.channel.kind == SINGLE and not copies:
        each = " ".join(f"{disk.target} {disk.map}" for disk in m.disks)
        raise MigrationError(
            f"the single channel leads nothing back to A: copy {each} from B to a directory on A, then: "
            f"nbd-migrate recover {m.state.name} --on a --from DIRECTORY"
        )
    names = {disk.target.rpartition("/")[2] for disk in m.disks}
    if copies and len(names) < len(m.disks):
        raise MigrationError(
            f"{listed(sorted(disk.target for disk in m.disks))} on B have no names of their own in one "
            "directory, --from: bring them by hand, with nbd-overlay commit, as docs/migrate.md has it"
        )


async def refuse_what_is_no_overlay(m: Migration, copies: str, *, b_is_off: bool) -> None:
    """Raise MigrationError unless what is to be committed are overlays of these disks; changes no disk."""
    if not b_is_off:
        # One that went on streaming might complete its disk after it was looked at.
        await end(m, Role.OVERLAY)
    host, paths = overlays_of(m, copies)
    whole = []
    for disk, path in zip(m.disks, paths, strict=True):
        try:
            facts = await image_facts(host, path, m.plan.limits.command)
        except MigrationError as error:
            raise MigrationError(f"{error}; nothing was written to {disk.image} on A") from error
        size = m.state.disk(disk).size
        if "backing-filename" not in facts:
            whole.append(path)
        elif size and facts["virtual-size"] != size:
            raise MigrationError(
                f"{path} on {host.name} is of a disk of {facts['virtual-size']} bytes, and {disk.image} on A "
                f"has {size}: another guest's? Nothing was written there"
            )
    if whole:
        raise MigrationError(
            f"complete, so that it is not known any more what the guest wrote: {listed(whole)} on "
            f"{host.name}; nothing was written to A's images; to boot the guest on B: nbd-migrate recover "
            f"{m.state.name} --on b"
        )


def overlays_of(m: Migration, copies: str) -> tuple[Host, list[str]]:
    """Return on which host the overlays are, or copies of them, and their paths."""
    if not copies:
        return m.host_b, [disk.target for disk in m.disks]
    return m.host_a, [f"{copies}/{disk.target.rpartition('/')[2]}" for disk in m.disks]


async def end(m: Migration, *roles: Role) -> None:
    """End what is in these roles; MigrationError where something stays."""
    for role, drive in m.roles(*roles):
        for adopt in (m.adopt_known, m.adopt):
            # One that was started in the place of the one that is known has its pid file.
            if child := await adopt(role, drive):
                await child.stop(m.plan.limits.stop)


async def end_users(m: Migration, *, b_is_off: bool) -> None:
    """End what has the disks open, on either host; MigrationError where something stays."""
    await end(m, *(() if b_is_off else (Role.OVERLAY,)), Role.SERVER, Role.FENCE)
    # Copies need nothing that leads to B.
    for role in () if b_is_off else carriers.ROLES:
        await m.adopt(role)
    if m.a.connected:
        await end_source(m)
    if m.a.connected:
        raise MigrationError("A's QEMU, whose guest has gone, does not end: kill it; then again")


async def serve(m: Migration, copies: str) -> tuple[Host, list[str], list[str]]:
    """Serve A's images for writing; return where the overlays are, and what each image is called there."""
    limits = m.plan.limits
    host, names = overlays_of(m, copies)
    if copies:
        socket = await beside(m.host_a, m.disks[0].image, SOCKET, limits.command)
        argv = [m.host_a.tool("nbdserve"), "-k", socket, "--pid-file", READY]
        pairs = zip(m.disks, await images_on_a(m, m.disks), strict=True)
        argv += [word for pair in pairs for word in ("--export", export_option(m, *pair))]
        uris = (NbdUri(socket=socket, export=m.plan.export_of(disk).export) for disk in m.disks)
        places = [str(uri) for uri in uris]
    else:
        await keys.make(m)
        await carriers.prepare(m)
        argv = await server_command(m, from_qemu=False, writable=True)
        places = [str(tls.disk_uri(m, disk)) for disk in m.disks]
        address = m.plan.export.address
        await make_lost(m.host_a, [address.socket] if address.socket else [], limits.command)
    server = await m.start(Role.SERVER, argv, ready=True)
    await m.during(server.ready(limits.start), limits.start, "starting the server on A, for writing")
    if not copies:
        await carriers.stand(m)
    return host, names, places


async def start(m: Migration, host: Host, argv: list[str]) -> Child:
    """Start it where the overlays are. It lives on when we die, and is ended by whoever does this again."""
    if host is m.host_b:
        return await m.start(Role.OVERLAY, argv, drive=m.disks[0].drive)
    log = (await m.place(host, m.disks[0].image, "commit")).with_suffix(".commit.log")
    return await m.children.start("nbd-overlay commit on A", host, log, argv)


async def clear(m: Migration, *, b_is_off: bool) -> None:
    """A has the guest's disks: end and remove what there was for the migration. What is left is told."""
    limits = m.plan.limits
    for role, drive in m.roles(Role.SERVER):
        if child := m.child(role, drive) or await m.adopt(role, drive):
            await child.stop(limits.stop)
    await give_back(m, committed=True)
    await carriers.end(m)
    await through_qemu.forget(m)
    await keys.remove_all(m)
    m.enter(Phase.RECOVERED, processes=(), tracking=None)
    files = listed(path for disk in m.disks for path in (disk.target, disk.map))
    told = "when host B is back, let nobody start the guest there; " if b_is_off else ""
    m.report.note(f"{told}{files} on B are of no use any more; to remove them: {removing(m)}")


def removing(m: Migration) -> str:
    """Return the commands that remove what is on B."""
    files = [path for disk in m.disks if not disk.on_device for path in disk.beside]
    commands = [["rm", "-f", "--", *files]] if files else []
    for disk in m.disks:
        if disk.on_device:
            commands.append([m.host_b.tool("nbd-overlay"), "discard", "--map", disk.map, disk.target])
    return " && ".join(pasted(m.host_b.typed(each)) for each in commands)
