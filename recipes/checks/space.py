"""Whether B has the space for the disks: for what they hold now, and for all that they may ever hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from nbdserve.common.sizes import format_size
from overlay.formats.device.map_place import is_among_devices
from recipes.hosts.host import Host


@dataclass(frozen=True)
class Need:
    """A disk: where it goes on B, and how many bytes it has, or holds."""

    target: str
    size: int


@dataclass(frozen=True)
class Shortage:
    """A file system on B with less room than is needed: of which directory, and how many bytes."""

    file_system: str
    directory: str
    free: int
    needed: int


async def shortages(needs: Sequence[Need], host_b: Host, limit: float) -> list[Shortage]:
    """Compare what the disks need, one after the other, with what is free; one for each that is too much."""
    needs = [
        need for need in needs if not is_among_devices(need.target)
    ]  # these have the space that they have
    if not needs:
        return []
    directories = [str(PurePosixPath(need.target).parent) for need in needs]
    said = await host_b.run("stat", "-f", "--format=%i %a %S", "--", *directories, limit=limit)
    needed: dict[str, int] = {}
    found = []
    for need, directory, line in zip(needs, directories, said.splitlines(), strict=True):
        file_system, blocks, block = line.split()
        needed[file_system] = needed.get(file_system, 0) + need.size
        free = int(blocks) * int(block)
        if needed[file_system] > free:
            found.append(Shortage(file_system, directory, free, needed[file_system]))
    return found


async def check_space(needs: Sequence[Need], host_b: Host, limit: float) -> list[str]:
    """Compare the sizes of the disks with what is free; return what may go wrong."""
    # Of each file system the last one has all its disks.
    last = {each.file_system: each for each in await shortages(needs, host_b, limit)}
    return [
        f"{each.directory} on B: {format_size(each.free)} are free, and the disks may grow to "
        f"{format_size(each.needed)}; when it is full the guest waits"
        for each in last.values()
    ]
