"""Which files a host has, told by a shell that waits there for the question."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing
from pathlib import Path

from recipes.hosts.host import Host
from recipes.hosts.images import FilesLater, files_at

LIMIT = 20.0
HERE = Host("this host")


def shells(path: Path) -> list[int]:
    """The processes that wait for a question about this file."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            words = (each / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(path) in words and words[0] == b"sh":
            found.append(int(each.name))
    return found


async def waiting(path: Path) -> list[int]:
    """Wait until there is such a shell."""
    async with asyncio.timeout(LIMIT):
        while not (found := shells(path)):
            await asyncio.sleep(0.01)
    return found


def test_the_answer_is_of_when_it_was_asked_and_not_of_when_the_shell_began(tmp_path: Path) -> None:
    path, missing = tmp_path / "disk with a blank", tmp_path / "none"
    path.write_bytes(b"before")

    async def ask() -> None:
        async with aclosing(FilesLater(HERE, [str(path), str(missing)])) as later:
            await waiting(path)
            [before] = await files_at(HERE, [str(path)], LIMIT)
            (tmp_path / "other").write_bytes(b"behind it")
            (tmp_path / "other").rename(path)
            told = await later.ask(LIMIT)
            assert told == await files_at(HERE, [str(path), str(missing)], LIMIT)
            assert (told[0] != before, told[1]) == (True, "")

    asyncio.run(ask())


def test_a_shell_that_was_not_asked_ends_with_who_has_started_it(tmp_path: Path) -> None:
    path = tmp_path / "disk"

    async def leave() -> None:
        async with aclosing(FilesLater(HERE, [str(path)])):
            await waiting(path)

    asyncio.run(leave())
    assert shells(path) == []


def test_a_shell_that_was_killed_meanwhile_costs_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x")

    async def ask() -> list[str]:
        async with aclosing(FilesLater(HERE, [str(path)])) as later:
            for pid in await waiting(path):
                os.kill(pid, signal.SIGKILL)
            return await later.ask(LIMIT)

    [told] = asyncio.run(ask())
    assert told == f"inode {path.stat().st_dev}:{path.stat().st_ino} 1"


def test_a_shell_that_did_not_wait_has_told_nothing(tmp_path: Path) -> None:
    """As where ssh gives it no input (StdinNull): what it says is of before it was asked."""
    path = tmp_path / "disk"
    path.write_bytes(b"before")
    impatient = Host("this host", shell=("sh", "-c", 'exec "$@" </dev/null', "sh"))

    async def ask() -> list[str]:
        async with aclosing(FilesLater(impatient, [str(path)])) as later:
            async with asyncio.timeout(LIMIT):
                while not later._answer.done():
                    await asyncio.sleep(0.01)
            path.write_bytes(b"behind it")
            return await later.ask(LIMIT)

    [told] = asyncio.run(ask())
    assert told == f"inode {path.stat().st_dev}:{path.stat().st_ino} 9"
