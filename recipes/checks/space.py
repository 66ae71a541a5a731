"""Whether B has the space for all that the disks may ever hold. What they hold now, preflight looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from nbdserve.common.sizes import format_size
from recipes.hosts.host import Host


@dataclass(frozen=True)
class Need:
    """A disk: where it goes on B, and its size in bytes."""

    target: str
    size: int


async def check_space(needs: Sequence[Need], host_b: Host, limit: float) -> list[str]:
    """Compare the sizes of the disks with what is free; return what may go wrong."""
    directories = [str(PurePosixPath(need.target).parent) for need in needs]
    said = await host_b.run("stat", "-f", "--format=%i %a %S", "--", *directories, limit=limit)
    needed: dict[str, int] = {}
    warnings: dict[str, str] = {}
    for need, directory, line in zip(needs, directories, said.splitlines(), strict=True):
        file_system, blocks, block = line.split()
        needed[file_system] = needed.get(file_system, 0) + need.size
        free = int(blocks) * int(block)
        if needed[file_system] > free:
            warnings[file_system] = (
                f"{directory} on B: {format_size(free)} are free, and the disks may grow to "
                f"{format_size(needed[file_system])}; when it is full the guest waits"
            )
    return list(warnings.values())
