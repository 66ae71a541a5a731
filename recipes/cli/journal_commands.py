"""The subcommands that work from a migration's journal: list, status, resume, abort, cleanup."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Coroutine

from nbdserve.common import clock, program
from nbdserve.common.errors import UsageError
from recipes.commands import overview
from recipes.commands.abort import abort
from recipes.commands.resume import resume
from recipes.errors import MigrationError
from recipes.hosts.interruption import interruptible
from recipes.migrate.console import choose_report
from recipes.migrate.journal import check_name, remove


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
    each = subcommands.add_parser("resume", help="go on with a migration whose command has died")
    each.description = (
        "Go on with a migration that nobody acts on any more, wherever it had come to. Where the guest is "
        "still on A the migration begins anew; where it is on B, what is left of steps 5 and 6 is done."
    )
    each.add_argument("name", metavar="NAME", type=check_name)
    each.add_argument(
        "--boot", action="store_true", help="start the guest on B again where its QEMU has ended"
    )
    each.set_defaults(body=run_resume)
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


def _tell(text: str) -> None:
    print(text, flush=True)


def show_list(given: argparse.Namespace) -> int:
    """``nbd-migrate list``."""
    for row in overview.rows():
        print(row.rstrip())
    return program.EXIT_DONE


def show_status(given: argparse.Namespace) -> int:
    """``nbd-migrate status``."""
    if given.watch:
        overview.watch(given.name, _tell, as_object=given.json)
        return program.EXIT_DONE
    text = overview.as_json(given.name) if given.json else "\n".join(overview.lines(given.name))
    _tell(text)
    return program.EXIT_DONE


def run_resume(given: argparse.Namespace) -> int:
    """``nbd-migrate resume``."""
    report = choose_report()
    with contextlib.closing(report):
        return clock.run(until_signal(resume(given.name, report, boot=given.boot)))


def run_abort(given: argparse.Namespace) -> int:
    """``nbd-migrate abort``."""
    report = choose_report()
    with contextlib.closing(report):
        return clock.run(until_signal(abort(given.name, report)))


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
