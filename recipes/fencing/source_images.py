"""A's images since their guest has left: where they are, and that they are out of reach."""

from __future__ import annotations

from collections.abc import Sequence

from nbdserve.exports.moved_images import MARKER, MOVED, Standing
from recipes.errors import MigrationError
from recipes.hosts import images
from recipes.hosts.images import files_at, same_file
from recipes.migrate.runtime import READY, Migration
from recipes.migrate.state import Disk, Role
from recipes.plans.disks import PlannedDisk
from recipes.processes.children import Child


async def start_fence(m: Migration, *, free: bool = False, away: bool = True) -> Child:
    """Start the fence on A; with ``away`` it puts the images out of reach before it is ready.

    With ``free`` it refuses images that somebody writes to. The journal says first where they will be.
    """
    words = ["--free"] if free else []
    if away:
        _note(m, m.state.with_moved())
        words += ["--away", m.state.name]
        words += [word for _, to in m.state.departures for word in ("--to", to)]
    command = m.host_a.own("fence", READY, *(disk.image for disk in m.disks), *words)
    return await m.start(Role.FENCE, command, ready=True)


async def put_away(m: Migration, standing: Standing = Standing.NEEDED) -> None:
    """See that A's images are out of reach; MigrationError where one is not.

    Who has one open goes on with it; others find it at files_on_a().
    """
    _note(m, m.state.with_moved())
    try:
        limit = m.plan.limits.command
        await images.put_away(m.host_a, m.state.name, standing, m.state.departures, limit)
    finally:
        await note_places(m)


async def give_back(m: Migration, *, committed: bool = False) -> None:
    """Give A's images their names back; MigrationError where one is in use, or another has its name.

    With ``committed`` they have what the guest wrote on B, and may have them already.
    """
    option = ["--committed"] if committed else []
    command = m.host_a.own("give-back", *option, *(disk.image for disk in m.disks))
    await m.host_a.run(*command, limit=m.plan.limits.command)
    _note(m, m.state.with_moved([""] * len(m.disks)))


async def note_places(m: Migration) -> None:
    """Write down where A's images are; where A does not answer, what was written down stays."""
    try:
        found = await files_on_a(m, m.disks)
    except MigrationError:
        return
    moved = [
        path if file and path != disk.image else "" for disk, (path, file) in zip(m.disks, found, strict=True)
    ]
    _note(m, m.state.with_moved(moved))


def _note(m: Migration, disks: tuple[Disk, ...]) -> None:
    if disks != m.state.disks:
        m.record(disks=disks)


async def files_on_a(m: Migration, disks: Sequence[PlannedDisk]) -> list[tuple[str, str]]:
    """Return for each disk where its image is on A, and what tells its file from others, as files_at() does.

    Where there is none, it is the path where it has to be, and nothing. Raises as Host.run().
    """
    paths = [path for disk in disks for path in (disk.image, f"{disk.image}{MOVED}", f"{disk.image}{MARKER}")]
    files = iter(await files_at(m.host_a, paths, m.plan.limits.command))
    return [place(m.state.disk(disk), next(files), next(files), next(files)) for disk in disks]


def place(disk: Disk, named: str, moved: str, marker: str) -> tuple[str, str]:
    """Choose between the files under an image's two names: who has its number is it, or else its marker says
    it.
    """
    found = [(disk.source, named), (disk.away, moved)]
    for path, file in found:
        if file and same_file(file, disk.file):
            return path, file
    path, file = found[bool(marker and moved and disk.away)]
    return (path, file) if file else (disk.on_a, "")


async def images_on_a(m: Migration, disks: Sequence[PlannedDisk]) -> list[str]:
    """Return where the images of these disks are on A; as was written down, where A does not answer."""
    if not m.arrived:
        return [disk.image for disk in disks]
    try:
        return [path for path, _ in await files_on_a(m, disks)]
    except MigrationError:
        return [m.state.disk(disk).on_a for disk in disks]
