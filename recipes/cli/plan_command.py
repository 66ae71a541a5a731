"""``nbd-migrate plan``: look at a running guest, and print how it can be moved."""

from __future__ import annotations

import argparse
import asyncio
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from nbdserve.common import clock, program
from nbdserve.common.errors import OperatorError, UsageError
from recipes.cli.journal_commands import add_verify
from recipes.connections.address import check_host, is_host_and_port, is_ssh
from recipes.discovery.addresses import MIGRATION_PORT, in_brackets
from recipes.discovery.discover import COMMAND, Wanted, discover
from recipes.discovery.document import Draft, write
from recipes.hosts.interruption import interruptible
from recipes.plans.channel import Channel
from recipes.plans.disks import check_path
from recipes.plans.plan import Plan, check_monitor
from recipes.plans.planfile import build
from recipes.plans.policy import HYBRID, POLICIES
from recipes.plans.reaching import looked_at
from recipes.plans.seeds import seeds_of

TO = (
    "host B: ssh://[USER@]HOST[:PORT]; or HOST[:PORT], an address of this machine at which it listens for "
    "the RAM; default: this machine"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Give ``plan`` its options."""
    text = partial(parser.add_argument, type=program.filled)
    several = partial(text, action="append", default=[])
    parser.description = (
        "Look at a running guest, by its monitor and its command line, and print a plan that moves it, with "
        "comments. Nothing is changed on either host. What cannot be moved is refused by name."
    )
    text(
        "--source",
        metavar="QMP|PID",
        required=True,
        help="the guest: its monitor, a socket's path or HOST:PORT, or the process id of its QEMU",
    )
    text(
        "--from",
        dest="from_host",
        metavar="HOST",
        help="host A: ssh://[USER@]HOST[:PORT]; default: this machine",
    )
    text("--to", metavar="HOST", help=TO)
    configure_places(parser)
    several("--seed", metavar="[NODE=]FILE", help="a copy on B: see nbd-migrate run")
    text("--channel", metavar="KIND", help="how disk and RAM get to B: see nbd-migrate run")
    parser.add_argument("--policy", choices=POLICIES, help="when the disks go: see nbd-migrate run")
    text("--cutover", metavar="WHEN", help="when the guest goes: see nbd-migrate run")
    add_verify(parser)
    parser.add_argument(
        "--output", metavar="FILE", type=program.filled_path, help="write the plan there; it must not exist"
    )


def configure_places(parser: argparse.ArgumentParser) -> None:
    """Give a subcommand what says where a guest that is looked at moves from and to."""
    text = partial(parser.add_argument, type=program.filled)
    several = partial(text, action="append", default=[])
    text("--to-dir", metavar="DIR", help="B's directory for the disks; default: as on A")
    several(
        "--target",
        metavar="[NODE=]PATH",
        help="where a disk ends on B, a file or a block device; of several disks NODE says of which; may be "
        "repeated; default: as --to-dir says",
    )
    text("--export", metavar="URI", help="where A serves the disks; default: as B reaches A")
    several(
        "--overwrite",
        metavar="DEVICE",
        help="a block device of B to which a disk moves, and on which there is something, which is lost; may "
        "be repeated",
    )


def main(given: argparse.Namespace) -> int:
    """``nbd-migrate plan``."""
    try:
        draft = seeded(drafted(given), given.seed)
        verify = True if given.verify is None and given.policy == HYBRID else given.verify
        policy, cutover = given.policy or "", given.cutover or ""
        overwrite = tuple(given.overwrite)
        text = write(replace(draft, policy=policy, cutover=cutover, verify=verify, overwrite=overwrite))
    except asyncio.CancelledError:
        return program.EXIT_INTERRUPTED
    # What is printed is what would run.
    build(tomllib.loads(text), {})
    if given.output is None:
        print(text, end="")
        return program.EXIT_DONE
    try:
        with given.output.open("x") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(f"--output: {given.output} exists; remove it, or choose another name") from error
    except OSError as error:
        raise OperatorError(f"--output: {given.output}: {error.strerror}") from error
    return program.EXIT_DONE


def seeded(draft: Draft, given: Sequence[str]) -> Draft:
    """Return the draft with what B has of its disks already. Raises UsageError."""
    names = [(disk.drive, disk.node) for disk in draft.derived.disks]
    seeds = seeds_of(given, names)
    return replace(draft, seeds=tuple(seeds.get(at, "") for at in range(len(names))))


def found(given: argparse.Namespace, overrides: Mapping[str, Mapping[str, object]]) -> Plan:
    """Return the plan of ``nbd-migrate run --source``; ``overrides`` win over what was found.

    Raises UsageError where somebody has to edit the plan first.
    """
    if given.source is None:
        raise UsageError("name a plan's file, or the guest: --source QMP|PID (see nbd-migrate run --help)")
    draft, places = clock.run(interruptible(_look(given)))
    if draft.on_one_machine and draft.derived.busy:
        what = " and ".join(draft.derived.busy)
        raise UsageError(
            f"two QEMUs on this machine cannot both have {what}: write the plan with nbd-migrate plan "
            "--output FILE, change that there, and run the file"
        )
    plan = build(tomllib.loads(write(draft)), overrides)
    # Where our commands are was looked for.
    source = replace(plan.source, bin=plan.source.bin or places[0])
    destination = replace(plan.destination, bin=plan.destination.bin or places[1])
    return replace(plan, source=source, destination=destination)


def drafted(given: argparse.Namespace) -> Draft:
    """Look at the guest. Raises CancelledError when a signal interrupts that."""
    return clock.run(interruptible(_look(given)))[0]


def check_source(source: str) -> None:
    """Raise UsageError unless this is a process id or the address of a monitor."""
    if source.isdecimal():
        if not 0 < len(source) < 10:
            raise UsageError(f"--source: there is no process {source[:40]}")
        return
    if not source.startswith("/") and not is_host_and_port(source):
        what = "write a process id, a socket's absolute path or HOST:PORT"
        raise UsageError(f"--source: {source[:100]!r} is not usable: {what}")
    check_monitor("--source", source)


def check_to(to: str) -> None:
    """Raise UsageError unless this is an address of this machine, with a port or without."""
    if not is_host_and_port(to) and not is_host_and_port(f"{in_brackets(to)}:{MIGRATION_PORT}"):
        raise UsageError(
            f"--to: {to!r} is not usable: write ssh://[USER@]HOST[:PORT]; or HOST[:PORT], with an IPv6 "
            "HOST in brackets where a PORT follows"
        )


async def _look(given: argparse.Namespace) -> tuple[Draft, tuple[str, str]]:
    """Return the draft, and on each host where our commands are, where that was looked for."""
    here, there = given.from_host or "", given.to or ""
    if here:
        check_host("--from", here)
    if is_ssh(there):
        check_host("--to", there)
    elif there:
        check_to(there)
    check_source(given.source)
    if given.to_dir:
        check_path("--to-dir", given.to_dir, directory=True)
    channel = given.channel or ""
    if channel:
        Channel(channel).check()
    for target in given.target:
        # A path may have a = in it.
        named = "=" in target and not target.startswith("/")
        check_path("--target", target.partition("=")[2] if named else target)
    wanted = Wanted(given.source, there, given.to_dir or "", given.export or "", channel, tuple(given.target))
    async with looked_at(here, there if is_ssh(there) else "", COMMAND) as (a, b):
        return await discover(wanted, a, b), (a.bin, b.bin)
