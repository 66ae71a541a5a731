"""Whether B has what the command line names and does not move: files, network interfaces, directories."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterator, Sequence

from recipes.checks.started import Started
from recipes.discovery.command_line.host_local import needed, shared_memory
from recipes.discovery.command_line.options import CommandLine
from recipes.discovery.derive import made_paths
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.quoting import on_one_line, pasted


async def check_local(
    host_b: Host, started: Started, sockets: Sequence[str], limit: float, made: Collection[str] = ()
) -> None:
    """Raise MigrationError for the first thing that is not on B.

    ``sockets`` are paths that will be listened on there besides those of the command line, and ``made`` are
    files that the migration makes.
    """
    if started.command is None:
        return
    asked = dict(_wanted(host_b, started.command, sockets, made))
    answers = await host_b.tests([*asked], limit) if asked else []
    for complaint, there in zip(asked.values(), answers, strict=True):
        if not there:
            raise MigrationError(complaint)
    for path in shared_memory(started.command.options):
        if await _is_mapped(host_b, path, limit):
            raise MigrationError(
                f"destination.qemu: the memory file {path}, with share=on, is in use on B: two guests in one "
                "memory destroy each other; name another file"
            )


def _wanted(
    host_b: Host, command: CommandLine, sockets: Sequence[str], made: Collection[str]
) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield what test(1) must say yes to, and what is to be said where it does not."""
    for option in command.options:
        for each in needed(option):
            if each.path.startswith("/") and each.path not in made:
                remedy = "make it there as it is on A, or change that option"
                yield ("-e", each.path), f"destination.qemu: B has not {each}; {remedy}"
    for path in (*made_paths(command, "/"), *sockets):
        directory = posixpath.dirname(path)
        make = pasted(host_b.argv(["mkdir", "-p", directory]))
        yield ("-d", directory), f"there is no directory for {path} on B; make it: {make}"


async def _is_mapped(host: Host, path: str, limit: float) -> bool:
    """Tell whether a process there has a regular file in its memory, as far as we may see that."""
    return (await host.run("sh", "-c", on_one_line(_MAPPED), "sh", path, limit=limit)).strip() == "yes"


_MAPPED = """
p=$(readlink -f -- "$1"); test -f "$p" || exit 0;
if grep -hsF -- "$p" /proc/[0-9]*/maps | sed "s/^[^\\/]*//" | grep -qxF -- "$p"; then echo yes; fi
"""
"""A directory, as that of huge pages, is left out: in it QEMU makes a file of its own."""
