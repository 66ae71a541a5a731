"""The subcommands that work from a migration's journal: list, status, resume, recover, abort,
cleanup.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import posixpath
import sys
import time
from collections.abc import Coroutine
from pathlib import Path

from nbdserve.common import clock, program
from nbdserve.common.errors import UsageError
from nbdserve.common.sizes import parse_size
from recipes.commands import overview, report
from recipes.commands.abort import abort
from recipes.commands.recover import recover
from recipes.commands.resume import resume
from recipes.errors import MigrationError
from recipes.hosts.interruption import interruptible, like_ctrl_c
from recipes.migrate import journal
from recipes.migrate.console import Board, choose_report
from recipes.migrate.decide import PREPARING
from recipes.migrate.journal import check_name, remove
from recipes.plans.limits import MOST
from recipes.running import cutover_wish, speed


def configure(subcommands: argparse._SubParsersAction[program.Parser]) -> None:
    """Add them to nbd-migrate."""
    each = subcommands.add_parser("list", help="the migrations that are known here")
    each.description = "Show each migration that is known here: its name, what it has come to, and who acts."
    each.set_defaults(body=show_list)
    each = subcommands.add_parser("status", help="what a migration has come to")
    each.description = "Show what a migration has come to, as its command wrote it down. No host is asked."
    each.add_argument("name", metavar="NAME", type=check_name)
    each.add_argument("--watch", action="store_true", help="go on telling until nobody is at work on it")
    each.add_argument("--json", action="store_true", help="as a JSON object, on one line")
    each.set_defaults(body=show_status)
    each = subcommands.add_parser("speed", help="change how fast the disk of a running migration is copied")
    each.description = (
        "Change what the stream of a migration may take while it runs, and say so once the run has taken it. "
        "It is written down, and also holds when the migration is resumed. The RAM is not slowed down."
    )
    each.add_argument("name", metavar="NAME", type=check_name)
    each.add_argument("size", metavar="SIZE", nargs="?", help="bytes per second, as in 50M; 0: any")
    add_finish_by(each)
    each.set_defaults(body=change_speed)
    each = subcommands.add_parser("cutover", help="let the guest of a running migration go to B now")
    each.description = (
        "Let the guest go to B now, of a migration with policy hybrid that copies its disk before, and say "
        "so once the run has taken it. What is not copied by then follows the guest."
    )
    each.add_argument("name", metavar="NAME", type=check_name)
    each.set_defaults(body=cut_over)
    each = subcommands.add_parser("report", help="one page about a migration, or the same as JSON")
    each.description = (
        "Write one HTML page about a migration: what came when, bytes, rate over time, downtime, window, and "
        "how long requests of the guest waited for A. It loads nothing from anywhere, and no host is asked. "
        "The page needs Matplotlib, as Debian's python3-matplotlib."
    )
    each.add_argument("name", metavar="NAME", type=check_name)
    each.add_argument(
        "--output", metavar="FILE.html", type=program.filled_path, help="where to; default: NAME.html, here"
    )
    each.add_argument("--json", action="store_true", help="the same as a JSON object, on standard output")
    each.set_defaults(body=write_report)
    each = subcommands.add_parser("resume", help="go on with a migration whose command has died")
    each.description = (
        "Go on with a migration that nobody acts on any more, wherever it had come to. Where the guest is "
        "still on A the migration begins anew; where it is on B, what is left of steps 5 and 6 is done."
    )
    each.add_argument("name", metavar="NAME", type=check_name)
    each.add_argument(
        "--boot", action="store_true", help="start the guest on B again where its QEMU has ended"
    )
    each.add_argument(
        "--source-address",
        metavar="HOST",
        help="A has this name or address now: its server is started there, and what reads it on B is told",
    )
    add_verify(each)
    each.set_defaults(body=run_resume)
    each = subcommands.add_parser("recover", help="boot a guest again whose QEMU on B is lost")
    each.description = (
        "Boot a guest again whose QEMU on B, or host B itself, has died after the cut-over and before its "
        "disk was complete. What it had flushed is there. On B its disk is completed under it. On A what it "
        "wrote on B is written to A's image first, and B's files are of no use any more."
    )
    each.add_argument("name", metavar="NAME", type=check_name)
    each.add_argument("--on", choices=("a", "b"), default="b", help="where it is booted (default: b)")
    each.add_argument(
        "--from",
        dest="copies",
        metavar="DIR",
        help="with --on a: a directory on A to which B's images and their maps were copied",
    )
    each.add_argument(
        "--b-is-off",
        action="store_true",
        help="with --from: you know that host B is off, or that its guest is; it is not asked",
    )
    each.add_argument(
        "--no-boot", action="store_true", help="only make its disk whole there, and do not start the guest"
    )
    each.set_defaults(body=run_recover)
    each = subcommands.add_parser("abort", help="give a migration up whose command has died")
    each.description = (
        "Give up a migration that nobody acts on any more: the guest runs on A as if nothing had happened, "
        "and what was made on B is removed. When the guest is on B it is too late: nothing is touched, "
        "and what is safe is said."
    )
    each.add_argument("name", metavar="NAME", type=check_name)
    each.set_defaults(body=run_abort)
    each = subcommands.add_parser("cleanup", help="forget migrations that are over")
    each.description = "Forget migrations that are over: these, or all of them. What they have made stays."
    each.add_argument("names", metavar="NAME", nargs="*", type=check_name)
    each.add_argument(
        "--force",
        action="store_true",
        help="forget also these that are not over, and say what is left of them; no host is asked",
    )
    each.set_defaults(body=run_cleanup)


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Give a parser the option that says whether what was copied is compared in the end."""
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compare what was copied on both hosts by hashes, but for what the guest has written, before "
        "A's image is given up; default: with the policy hybrid",
    )


def add_finish_by(parser: argparse.ArgumentParser) -> None:
    """Give a parser the option that says when a stream is to have ended."""
    parser.add_argument(
        "--finish-by",
        metavar="TIME",
        help="choose the speed by when the stream is to have ended: HH:MM, or a date as 2030-01-31T06:00",
    )


def _tell(text: str) -> None:
    print(text, flush=True)


def _tell_aside(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show_list(given: argparse.Namespace) -> int:
    """``nbd-migrate list``."""
    for row in overview.rows():
        print(row.rstrip())
    return program.EXIT_DONE


def show_status(given: argparse.Namespace) -> int:
    """``nbd-migrate status``."""
    if given.watch:
        with Board(sys.stdout if sys.stdout.isatty() and not given.json else None) as board:
            overview.watch(given.name, board.show, as_object=given.json)
        return program.EXIT_DONE
    text = overview.as_json(given.name) if given.json else "\n".join(overview.lines(given.name))
    _tell(text)
    return program.EXIT_DONE


class Running:
    """A migration of which something is asked."""

    def __init__(self, name: str) -> None:
        self._name = name

    def actor(self) -> int:
        """Return the process that acts on it."""
        return journal.actor(self._name)

    def doing(self) -> str:
        """Return what it does."""
        return overview.PHASES[journal.last(self._name).phase]


def change_speed(given: argparse.Namespace) -> int:
    """``nbd-migrate speed``."""
    if (given.size is None) == (given.finish_by is None):
        raise UsageError("speed: give either SIZE or --finish-by")
    if given.size is not None:
        size, most = parse_size(given.size, "SIZE"), MOST["speed"][0]
        if size > most:
            raise UsageError(f"SIZE: {size} is too large: at most {most} bytes per second")
        asked = speed.Asked.new(speed=size)
    else:
        asked = speed.Asked.new(finish_by=speed.moment(given.finish_by, "--finish-by", time.time()))
    if journal.last(given.name).complete:
        raise MigrationError(f"{given.name}: every block is on B already, so nothing was changed")
    with like_ctrl_c():
        speed.ask(journal.directory_of(given.name), asked, Running(given.name), tell=_tell_aside)
    _tell(f"{given.name}: the stream's speed: {speed.described(asked.speed, asked.finish_by)}")
    return program.EXIT_DONE


def cut_over(given: argparse.Namespace) -> int:
    """``nbd-migrate cutover``."""
    state, running = journal.last(given.name), Running(given.name)
    if not state.plan.hybrid:
        raise MigrationError(f"{given.name}: its policy is postcopy: the guest goes first in any case")
    if state.phase not in PREPARING:
        raise MigrationError(f"{given.name}: it is too late, or not needed: it is at: {running.doing()}")
    with like_ctrl_c():
        cutover_wish.ask(journal.directory_of(given.name), running, tell=_tell_aside)
    _tell(f"{given.name}: the guest goes now")
    return program.EXIT_DONE


def write_report(given: argparse.Namespace) -> int:
    """``nbd-migrate report``."""
    if given.json and given.output:
        raise UsageError("--json goes to standard output: leave --output out")
    if given.json:
        _tell(json.dumps(report.account_of(given.name).to_json()))
        return program.EXIT_DONE
    output = given.output or Path(f"{given.name}.html")
    report.write(given.name, output)
    _tell(f"{given.name}: {output} is the report")
    return program.EXIT_DONE


def run_resume(given: argparse.Namespace) -> int:
    """``nbd-migrate resume``."""
    told = choose_report()
    with contextlib.closing(told):
        work = resume(
            *(given.name, told),
            boot=given.boot,
            verify=given.verify,
            source_address=given.source_address,
        )
        return clock.run(until_signal(work))


def run_recover(given: argparse.Namespace) -> int:
    """``nbd-migrate recover``."""
    copies = given.copies or ""
    if copies != "/":
        copies = copies.removesuffix("/")  # as a shell completes it
    if given.on == "b" and (copies or given.b_is_off):
        raise UsageError("--from and --b-is-off are for recover --on a")
    if given.b_is_off and not copies:
        raise UsageError("--b-is-off: without host B its files are needed: --from DIR")
    if copies and (not copies.startswith("/") or posixpath.normpath(copies) != copies):
        raise UsageError(f"--from: {copies!r} is no absolute path without '.', '..' and double slashes")
    told = choose_report()
    with contextlib.closing(told):
        work = recover(
            *(given.name, told),
            on_a=given.on == "a",
            copies=copies,
            b_is_off=given.b_is_off,
            boot=not given.no_boot,
        )
        return clock.run(until_signal(work))


def run_abort(given: argparse.Namespace) -> int:
    """``nbd-migrate abort``."""
    told = choose_report()
    with contextlib.closing(told):
        return clock.run(until_signal(abort(given.name, told)))


async def until_signal(work: Coroutine[object, object, object]) -> int:
    """Do it, unless a signal interrupts it; then in good order."""
    try:
        await interruptible(work)
    except asyncio.CancelledError:
        return program.EXIT_INTERRUPTED
    return program.EXIT_DONE


def run_cleanup(given: argparse.Namespace) -> int:
    """``nbd-migrate cleanup``."""
    if given.force and not given.names:
        raise UsageError("--force: name the migrations")
    for name in given.names:
        # Told first, so that it is not lost with an output that cannot be written.
        for left in overview.to_be_forgotten(name, force=given.force):
            _tell(f"{name}: {left}")
        remove(name)
    for name in () if given.names else overview.over():
        # Somebody may have begun one of the same name.
        with contextlib.suppress(MigrationError):
            overview.to_be_forgotten(name)
            remove(name)
    return program.EXIT_DONE
