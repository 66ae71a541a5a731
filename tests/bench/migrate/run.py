"""One migration: the hosts, the link, the guest that works, the contender, and what became of the disk."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil

from nbdserve.exports.moved_images import find_marker
from recipes.errors import MigrationError
from recipes.fencing.giving_back import free
from recipes.fencing.moving import image_now
from tests.bench.fillers import touch_memory
from tests.bench.migrate.contenders import Contender
from tests.bench.migrate.guest import Guest, GuestError
from tests.bench.migrate.hosts import Link, hosts
from tests.bench.migrate.sample import Sample, sample
from tests.bench.migrate.setting import MoveError, Setting, monitor, raw_on
from tests.bench.migrate.workload import HOT
from tests.support.disks import MIB
from tests.support.guests import short_directory
from tests.support.processes import NotReadyError, Process
from tests.support.servers import UnixAddress
from tests.support.wire import Command, Wire, request

_PIECE = 64 << 10
"""Bytes that are compared at a place."""

_PLACES = 24
"""Places that are compared."""

FAILURES = (MoveError, GuestError, MigrationError, NotReadyError)
"""Of a migration, which do not end the bench."""

BOOT = 60.0
"""Seconds in which an idle machine boots the guest."""


def attempt(contender: Contender, link: Link, guest: Guest, image: Path, seconds: float) -> Sample | str:
    """Move a guest, and return what that has shown, or in one line why it has failed."""
    try:
        return migrate(contender, link, guest, image, seconds)
    except FAILURES as error:
        return in_one_line(error)


def in_one_line(error: Exception) -> str:
    """Return what a failure says in the end."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def migrate(contender: Contender, link: Link, guest: Guest, image: Path, seconds: float) -> Sample:
    """Move a guest that works, and watch it for ``seconds`` before and after; MoveError if that fails."""
    directory, size = image.parent, image.stat().st_size
    touch_memory(directory, size // MIB * MIB)
    with ExitStack() as stack:
        guest = replace(guest, sockets=stack.enter_context(short_directory()))
        made = stack.enter_context(hosts(link, guest.sockets))
        heard = stack.enter_context(guest.heard())
        setting = Setting(made, guest, directory, image, size, heard, stack)
        stack.enter_context(nothing_left(setting))
        machine = setting.qemu("a", raw_on(image))
        machine.wait_for(lambda: heard.first_on("a"), "the guest works", BOOT)
        time.sleep(seconds)
        moved = contender.move(setting)
        time.sleep(seconds)
        found = sample(moved, heard.done, made.passed())
        asyncio.run(end(setting, "b"))
        compare(image_now(str(image)), setting.target(moved.layout), moved.layout, guest.sockets)
    return found


async def end(setting: Setting, host: str) -> None:
    """End a QEMU in good order, so that its disk is whole."""
    async with monitor(setting, host) as vm:
        await vm.execute("quit")
        await vm.gone()


def compare(image: Path, target: Path, layout: str, sockets: Path) -> None:
    """Look at places that the guest has not written; MoveError where the copy is another one."""
    end, at = image.stat().st_size // _PIECE, UnixAddress(sockets / "compared.nbd")
    pid_file = sockets / "compared.pid"
    served = ("-r", "-f", layout, "-k", at.path, "--pid-file", pid_file, target)
    with Process(["qemu-nbd", *served], sockets / "compared.log") as server, image.open("rb") as original:
        server.wait_for_pid_file(pid_file)
        with Wire(at, seconds=60) as wire:
            wire.go("")
            for piece in random.sample(range(end // HOT + 1, end), min(_PLACES, end // 2)):
                original.seek(piece * _PIECE)
                wire.send(request(Command.READ, piece * _PIECE, _PIECE))
                if wire.simple_reply().error or wire.receive(_PIECE) != original.read(_PIECE):
                    raise MoveError(f"{target} is another disk at {piece * _PIECE}")


@contextmanager
def nothing_left(setting: Setting) -> Iterator[None]:
    """Kill what a migration has left running, remove its files, and give A's image its name back; a guest on
    B lives on, and its image on A is out of reach, by design.
    """
    try:
        yield
    except BaseException as error:
        for pattern in ("*.log", "*.console"):
            for log in sorted(setting.guest.sockets.glob(pattern)):
                print(f"{log.name}: {log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        if not isinstance(error, FAILURES):
            raise
        # The files are gone in a moment.
        raise MoveError(f"{in_one_line(error)}; {consoles(setting.guest.sockets)}") from error
    finally:
        marks = str(setting.guest.sockets), str(setting.directory)
        killed = []
        for process in psutil.process_iter(["cmdline"]):
            words = " ".join(process.info["cmdline"] or [])
            if any(mark in words for mark in marks) and process.pid not in ours():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
                    killed.append(process)
        psutil.wait_procs(killed, timeout=10)
        for path in setting.directory.glob("b.*"):
            path.unlink()
        # The next guest is moved from it, too.
        if find_marker(setting.image):
            free(setting.image)


def consoles(sockets: Path) -> str:
    """Return in one line what the guest's consoles ended with; they are silent unless its kernel panics, or
    its program fails.
    """
    found = {each.stem: last_words(each.read_text(errors="replace")) for each in sockets.glob("*.console")}
    return "; ".join(f"its console on {host}: {found[host]}" for host in sorted(found))


def last_words(console: str) -> str:
    """Return the line in which a kernel says why it gives up, or else the last one."""
    lines = [line.strip() for line in console.splitlines() if line.strip()]
    return ([line for line in lines if "Kernel panic" in line] or lines or ["silent"])[-1]


def ours() -> set[int]:
    """The bench itself, and who has started it."""
    this = psutil.Process()
    return {this.pid, *(each.pid for each in this.parents())}
