"""What a migration that was given up leaves on B, whose QEMU was killed."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from recipes.hosts.host import Host
from recipes.migrate.leftovers import remove_dead_sockets
from recipes.migrate.state import State
from recipes.plans.plan import Destination, Export, Plan, Source
from tests.support.guests import short_directory


def test_its_sockets_go_but_not_those_on_which_somebody_listens() -> None:
    with short_directory() as directory:
        ram, monitor, console, other, log = (
            directory / name for name in ("a.ram", "b.qmp", "console of b", "other", "log")
        )
        qemu = ("qemu-system-x86_64", "-serial", f"unix:{console},server=on", "-D", str(log))
        more = ("-monitor", f"unix:{other},server=on", "-serial", f"unix:{directory / 'none'},server=on")
        plan = Plan(
            Source(qmp="/run/a.qmp", image="/a.raw"),
            Export("nbd://127.0.0.1/vm"),
            Destination(
                qemu=(*qemu, *more), qmp=str(monitor), migration=f"unix:{ram}", image=str(directory / "b.raw")
            ),
        )
        log.write_text("what it has said")
        for dead in (ram, monitor, console):
            bound(dead).close()
        with bound(other):
            left = asyncio.run(remove_dead_sockets(Host("B"), State("vm", plan), 60.0))
            assert left == []
            assert {each.name for each in directory.iterdir()} == {"other", "log"}


def test_what_cannot_be_removed_is_told_with_the_command_that_does_it() -> None:
    plan = Plan(
        Source(qmp="/run/a.qmp", image="/a.raw"),
        Export("nbd://127.0.0.1/vm"),
        Destination(qemu=("qemu",), qmp="/run/b.qmp", migration="tcp:127.0.0.1:4444", image="/b.raw"),
    )
    [left] = asyncio.run(remove_dead_sockets(Host("B", ("false",)), State("vm", plan), 60.0))
    assert left.startswith("sockets of B's QEMU may still be on B (there is no way to B by 'false': ")
    assert left.endswith("): when it answers, type: nbd-migrate abort vm")


def bound(path: Path) -> socket.socket:
    """A socket that listens at this path; closing it leaves the path, as the end of a process does."""
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen()
    return made
