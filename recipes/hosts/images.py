"""What is said of an image on a host: by nbd-overlay, and by the system."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbdserve.exports.moved_images import Standing
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line

_FILES = on_one_line("""
for p; do
if test -b "$p"; then set -- $(stat -L -c "0x%t 0x%T" -- "$p");
read -r n < "/sys/dev/block/$(($1)):$(($2))/size"; echo "device $(($1)):$(($2)) $((n * 512))";
elif test -e "$p"; then stat -L -c "inode %d:%i %s" -- "$p";
else echo; fi;
done
""")
"""Says of each path, on a line, what no other file has, and its bytes; nothing where nothing is there."""


async def files_at(host: Host, paths: Sequence[str], limit: float) -> list[str]:
    """Return for each path what tells the file, or device, there from any other, and how long it is.

    Empty where there is none. Raises as Host.run().
    """
    said = await host.run("sh", "-c", _FILES, "sh", *paths, limit=limit)
    return said.split("\n")[: len(paths)]


def same_file(one: str, other: str) -> bool:
    """Tell whether files_at() has said of both that they are one file of a directory, at whatever time.

    The number of a file system may be another one after a boot.
    """
    return bool(one and other) and one.split()[1].split(":")[1] == other.split()[1].split(":")[1]


async def put_away(
    host: Host, migration: str, standing: Standing, departures: Sequence[tuple[str, str]], limit: float
) -> None:
    """Put images out of reach (fencing/moving.py), each with words that say where its guest has that disk.

    Raises as Host.run(), also where one keeps its name.
    """
    words = [word for departure in departures for word in departure]
    await host.run(*host.own("put-away", migration, standing.value, *words), limit=limit)


class FilesLater:
    """files_at() whose answer is needed at once when it is asked for: the shell that gives it waits there."""

    def __init__(self, host: Host, paths: Sequence[str]) -> None:
        self._host, self._paths = host, paths
        self._asked: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        script = f"read -r go || exit 1; {_FILES}"
        self._answer = asyncio.create_task(
            host.run("sh", "-c", script, "sh", *paths, limit=math.inf, given=self._asked)
        )

    async def ask(self, limit: float) -> list[str]:
        """Return what files_at() does, of the files that are there now; raises as that. Only once."""
        # What waited there for long may be gone, or the way to it; what has not waited has looked too early.
        if not self._answer.done():
            self._asked.set_result("\n")
            await asyncio.wait({self._answer}, timeout=limit / 2)
            if self._answer.done() and not self._answer.exception():
                return self._answer.result().split("\n")[: len(self._paths)]
        return await files_at(self._host, self._paths, limit / 2)

    async def aclose(self) -> None:
        """Let the shell end; it may not have been asked."""
        self._answer.cancel()
        # Why it could not be asked was told by who was asked instead.
        await asyncio.gather(self._answer, return_exceptions=True)


_OPEN = on_one_line("""
for f in /proc/"$1"/fd/*; do
if test "$(stat -L -c %d:%i -- "$f" 2>/dev/null)" = "$2"; then echo "$f"; readlink -- "$f"; exit; fi; done
""")
"""Says by which descriptor the process $1 has the file $2 open, and what that is called now."""

_DELETED = " (deleted)"
"""How Linux marks the name of a file that has none any more."""


@dataclass(frozen=True)
class OpenFile:
    """A file that a process has open: the path that leads to it, and its name; empty if it was deleted."""

    descriptor: str
    name: str


async def open_in(host: Host, pid: int, file: str, limit: float) -> OpenFile | None:
    """Return where a process there has a file open, which is told as by files_at(); raises as Host.run()."""
    said = await host.run("sh", "-c", _OPEN, "sh", str(pid), file.split()[1], limit=limit)
    descriptor, _, name = said.rstrip("\n").partition("\n")
    return OpenFile(descriptor, "" if name.endswith(_DELETED) else name) if descriptor else None


async def image_facts(host: Host, image: str, limit: float) -> dict[str, Any]:
    """Return what nbd-overlay says of an image on a host, also of one in use.

    Raises MigrationError as ``Host.told``.
    """
    return await host.told(host.tool("nbd-overlay"), "info", "-U", "--json", image, limit=limit)


async def holds_something(
    host: Host, image: str, limit: float, *, copies: bool = False, is_disk: bool = True
) -> bool:
    """Tell whether anything of a disk is in an image; with ``copies`` only what a guest wrote counts.

    ``is_disk`` says what an image without a backing is: a complete disk, or none of ours. Raises as
    ``image_facts``, also if that is not told.
    """
    if not await host.test("-e", image, limit):
        return False
    facts = await image_facts(host, image, limit)
    if "backing-filename" not in facts:
        return is_disk
    if copies and "written-size" in facts:
        return bool(facts["written-size"])
    if "local-size" not in facts:
        raise MigrationError(f"{image} on {host.name} does not tell how much of the disk it holds")
    return bool(facts["local-size"])
