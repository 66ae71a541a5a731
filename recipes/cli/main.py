"""``nbd-migrate``: run a migration, and show one. What recipes and supervisors call is in small.py."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nbdserve.common import clock, program, sizes
from nbdserve.common.errors import UsageError
from recipes.cli import fence_command, journal_commands, pivot_command, plan_command, small
from recipes.cli.journal_commands import add_finish_by, add_verify, until_signal
from recipes.cli.small import PROGRAM
from recipes.commands.finish import finish
from recipes.commands.run import migrate
from recipes.connections.address import is_host_and_port, is_ssh
from recipes.demo import run as demo
from recipes.discovery.addresses import MIGRATION_PORT, in_brackets
from recipes.hosts.quoting import pasted
from recipes.migrate.console import choose_report
from recipes.migrate.journal import check_name
from recipes.plans.plan import Plan
from recipes.plans.planfile import load
from recipes.plans.policy import POLICIES
from recipes.plans.seeds import with_seeds
from recipes.running.speed import moment

EPILOGUE = """
For recipes and for the other host of a migration:
  nbd-migrate qmp MONITOR COMMAND [JSON]     execute one QMP command
  nbd-migrate fence READY IMAGE...           keep every QEMU from writing to the images
  nbd-migrate put-away NAME STANDING IMAGE TO    put an image out of reach whose guest has moved
  nbd-migrate give-back IMAGE...             the opposite
  nbd-migrate marks IMAGE...                 what this host knows of such images
  nbd-migrate probe URI                      what this host sees of an export
  nbd-migrate supervisor LOG READY COMMAND   run a process that ends with our standard input
  nbd-migrate bridge MONITOR                 pass a monitor of this host on to standard input and output
  nbd-migrate tunnel READY ORDERS            lead sockets from one host to the other, by way of ssh
  nbd-migrate listen SOCKET OWNER MODE       this host's end of such a tunnel
  nbd-migrate take SOCKET NUMBER             one client of that, on standard input and output
  nbd-migrate attach LOG                     speak with the supervisor of a process that was released
  nbd-migrate process MONITOR|PID            what this host knows of a guest's QEMU
  nbd-migrate reach answer|ask ADDRESS PORT TOKEN SECONDS    either end of a look whether a port is reached
  nbd-migrate route ADDRESS PORT             how this host is reached from another, and a port that is free

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run nbd-migrate with these arguments, or the process's; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    alone = small.find(words)
    if alone:
        return alone()
    return program.run(PROGRAM, lambda: dispatch(words))


def dispatch(words: list[str]) -> int:
    """Run the subcommand and return its exit code."""
    arguments = make_parser().parse_args(words)
    return int(arguments.body(arguments))


def make_parser() -> program.Parser:
    """Return the command line of nbd-migrate."""
    parser = program.Parser(
        prog=PROGRAM,
        description="Move a running virtual machine to another host, and its disk after it.",
        epilog=EPILOGUE,
        formatter_class=program.RawHelpFormatter,
    )
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True)
    look = subcommands.add_parser("plan", help="look at a guest, and print a plan to move it; touch nothing")
    plan_command.configure(look)
    look.set_defaults(body=plan_command.main)
    run = subcommands.add_parser("run", help="migrate a guest")
    configure_run(run)
    run.set_defaults(body=run_plan)
    end = subcommands.add_parser("finish", help="do what a run that was interrupted has left to do")
    configure_finish(end)
    end.set_defaults(body=finish_plan)
    journal_commands.configure(subcommands)
    lift = subcommands.add_parser("fence", help="let guests use an image again that one has moved from")
    fence_command.configure(lift)
    lift.set_defaults(body=fence_command.main)
    show = subcommands.add_parser("demo", help="the whole sequence on this machine, with a real guest")
    demo.configure(show)
    show.set_defaults(body=demo.main)
    move = subcommands.add_parser("pivot", help="let QEMU use a complete image instead of nbd-overlay")
    pivot_command.configure(move)
    move.set_defaults(body=pivot_command.main)
    return parser


def configure_run(parser: argparse.ArgumentParser) -> None:
    """Give ``run`` its options. What is given here wins over the plan file."""
    parser.description = (
        "Migrate a guest in six steps. Without a plan's file --source says which guest, and all else is "
        "found out as by 'nbd-migrate plan'. An option wins over the file."
    )
    configure_plan(parser, optional=True)
    plan_command.configure_places(parser)
    parser.add_argument("--name", type=check_name, help="the migration's name; else the guest's")
    add_finish_by(parser)
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON on standard output")
    parser.add_argument("--check", action="store_true", help="only check the plan's file; touch no host")


def configure_finish(parser: argparse.ArgumentParser) -> None:
    """Give ``finish`` its options."""
    parser.description = (
        "Do what is left of steps 5 and 6 of a plan, after a run that was interrupted or has failed when the "
        "guest had left A: stream, let the guest use its own disk, end what is not needed any more. It looks "
        "first, refuses while the guest is on A, and may be repeated. Give it the options that the run had."
    )
    configure_plan(parser)
    parser.add_argument(
        "--boot", action="store_true", help="start the guest on B again where its QEMU has ended"
    )


def configure_plan(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Give a subcommand the plan, and what wins over its file."""
    text = partial(parser.add_argument, type=program.filled)
    several = partial(text, action="append", default=[])
    nargs = "?" if optional else None
    parser.add_argument(
        "plan", metavar="PLAN.toml", type=program.filled_path, nargs=nargs, help="see docs/migrate.md"
    )
    source = "A's monitor: a socket's path, or HOST:PORT"
    if optional:
        source += "; without PLAN.toml also the process id of its QEMU"
    text("--source", metavar="QMP|PID" if optional else "QMP", help=source)
    text("--from", dest="from_host", metavar="HOST", help="host A: ssh://[USER@]HOST[:PORT]")
    text(
        "--to",
        metavar="HOST",
        help="host B: ssh://[USER@]HOST[:PORT]; or HOST[:PORT], where it listens for the RAM (port 4444)",
    )
    text(
        "--channel",
        metavar="KIND",
        help="tls (the default): disk and RAM encrypted, with certificates for this migration; ssh: both "
        "through your ssh, without any port; single: both in one encrypted connection from A to B; or plain",
    )
    parser.add_argument(
        "--policy",
        choices=POLICIES,
        help="postcopy: the disk follows the guest (the default); hybrid: most of it goes before the guest",
    )
    text(
        "--cutover",
        metavar="WHEN",
        help="with hybrid, when the guest goes: auto (default), when-converged, 'at-window SECONDS', manual",
    )
    several(
        "--seed",
        metavar="[NODE=]FILE",
        help="a raw copy of a disk on B, an older one perhaps: what is the same in it is not sent; of "
        "several disks NODE says of which; may be repeated",
    )
    add_verify(parser)
    text("--speed", metavar="SIZE", help="bytes per second that the stream may take; 0: any")
    text("--move-aside", metavar="PATH", help="where to move the source's image at the end")
    parser.add_argument(
        "--engine",
        choices=["overlay", "qemu"],
        help="who copies: nbd-overlay, into a raw file (the default), or B's QEMU, into a QED image",
    )


def run_plan(given: argparse.Namespace) -> int:
    """``nbd-migrate run``."""
    finish_by = finishing(given)
    if given.plan is None:
        return run_found(given, finish_by)
    for name in ("to_dir", "export", "target"):
        if getattr(given, name):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} is for a guest that is to be looked at; the plan's file says that itself"
            )
    plan = with_seeds(load(given.plan, overrides(given)), given.seed)
    if given.check:
        print(f"{given.plan}: nothing is wrong with it")
        return program.EXIT_DONE
    return run_all(plan, given, finish_command(given), finish_by)


def run_found(given: argparse.Namespace, finish_by: float) -> int:
    """``nbd-migrate run --source ...``: find out what there is to know, and run that."""
    changed = overrides(given)
    changed["source"].clear()
    changed["destination"].pop("migration", None)
    plan = with_seeds(plan_command.found(given, changed), given.seed)
    if given.check:
        print("nothing is wrong with the plan that was found")
        return program.EXIT_DONE
    return run_all(plan, given, "", finish_by)


def run_all(plan: Plan, given: argparse.Namespace, finish: str, finish_by: float) -> int:
    """Run the six steps; ``finish`` is the command that does what an interruption leaves, or nothing."""
    report = choose_report(as_json=given.json)
    with contextlib.closing(report):
        work = migrate(plan, report, name=given.name or "", finish=finish, finish_by=finish_by)
        return clock.run(until_signal(work))


def finishing(given: argparse.Namespace) -> float:
    """Return when the stream is to have ended, in seconds since the epoch; 0 if that was not said."""
    if given.finish_by is None:
        return 0.0
    if given.speed is not None:
        raise UsageError("--finish-by chooses the speed: leave --speed out")
    return moment(given.finish_by, "--finish-by", time.time())


def finish_plan(given: argparse.Namespace) -> int:
    """``nbd-migrate finish``."""
    plan = with_seeds(load(given.plan, overrides(given)), given.seed)
    report = choose_report()
    work = finish(plan, report, boot=given.boot, again=finish_command(given))
    with contextlib.closing(report):
        return clock.run(until_signal(work))


def finish_command(given: argparse.Namespace) -> str:
    """Return what the operator types to do the rest of this plan, as one line for a shell."""
    program = sys.argv[0] if Path(sys.argv[0]).name == PROGRAM else PROGRAM
    words = [PROGRAM if shutil.which(PROGRAM) == program else str(Path(program).absolute()), "finish"]
    options = (("source", given.source), ("from", given.from_host), ("to", given.to))
    more = (
        *(("channel", given.channel), ("policy", given.policy), ("cutover", given.cutover)),
        ("speed", given.speed),
    )
    for name, value in (*options, *more, ("move-aside", given.move_aside), ("engine", given.engine)):
        if value is not None:
            words += [f"--{name}", value]
    if given.verify is not None:
        words.append("--verify" if given.verify else "--no-verify")
    words += [word for seed in given.seed for word in ("--seed", seed)]
    return pasted([*words, str(given.plan.absolute())])


def overrides(given: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Return the options that stand for keys of the plan, by section."""
    sections = ("source", "destination", "channel", "limits", "finish")
    found: dict[str, dict[str, object]] = {section: {} for section in sections}
    if given.source is not None:
        found["source"]["qmp"] = given.source
    if given.engine is not None:
        found["destination"]["engine"] = given.engine
    for name in ("policy", "cutover"):
        if getattr(given, name) is not None:
            found["destination"][name] = getattr(given, name)
    if given.channel is not None:
        found["channel"]["kind"] = given.channel
    if given.from_host is not None:
        found["source"]["host"] = given.from_host
    if given.to is not None and is_ssh(given.to):
        found["destination"]["host"] = given.to
    elif given.to is not None:
        address = given.to if is_host_and_port(given.to) else f"{in_brackets(given.to)}:{MIGRATION_PORT}"
        found["destination"]["migration"] = f"tcp:{address}"
    if getattr(given, "overwrite", None):
        found["destination"]["overwrite"] = given.overwrite
    if given.speed is not None:
        found["limits"]["speed"] = sizes.parse_size(given.speed, "--speed")
    if given.verify is not None:
        found["finish"]["verify"] = given.verify
    if given.move_aside is not None:
        found["finish"]["move_aside"] = given.move_aside
    return found
