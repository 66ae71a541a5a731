"""``nbd-migrate demo``: the six steps on this machine, with a real guest, and the verdict on its disk."""

from __future__ import annotations

import argparse
import asyncio
import signal
from contextlib import ExitStack
from dataclasses import dataclass

from nbdserve.common import clock
from nbdserve.common.clock import now
from nbdserve.common.program import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, filled_path
from nbdserve.common.sizes import format_size, parse_size
from recipes.commands.run import migrate
from recipes.demo import disk, records
from recipes.demo.guest import Guest, Memory
from recipes.demo.stage import CHANNELS, Stage, prepare
from recipes.demo.verdict import Phases, Verdict
from recipes.demo.workplace import kept_directory, temporary_directory
from recipes.errors import MigrationError
from recipes.hosts.host import Host
from recipes.hosts.interruption import interruptible
from recipes.migrate.console import choose_report
from recipes.migrate.progress import Moment, Outcome, Progress, Report, Step, StepResult
from recipes.plans.limits import Limits
from recipes.processes.children import Child, Children

BOOT_LIMIT = 300.0  # seconds until the guest must have found its disk
WRITE_LIMIT = 120.0  # seconds until the guest must have written the next record


@dataclass(frozen=True)
class Evidence:
    """What can be seen while the guest is there."""

    memory: Memory
    phases: Phases
    leftovers: tuple[str, ...]


class Witness(Report):
    """Passes on what the migration tells and notes how far the guest was at the moments that matter."""

    def __init__(self, stage: Stage, audience: Report) -> None:
        self.stage = stage
        self.audience = audience
        self.before = self.cut_over = self.streamed = 0

    def phases(self, verified: int) -> Phases:
        """Return the phases, when the guest has looked at its disk after record ``verified``."""
        return Phases(self.before, self.cut_over, self.streamed, verified)

    def step_started(self, step: Step) -> None:
        """The guest's records before the migration are those before its RAM begins to move."""
        if step is Step.MIGRATE:
            self.before = self.stage.guest_on_a.announced
        self.audience.step_started(step)

    def moment(self, moment: Moment) -> None:
        """While the guest stands still, what it has announced on A is all that it has written there."""
        if moment is Moment.SWITCHOVER:
            self.cut_over = self.stage.guest_on_a.announced
        self.audience.moment(moment)

    def step_done(self, result: StepResult) -> None:
        """When every block is local, A is not needed any more."""
        if result.step is Step.STREAM:
            # On B it may not have announced anything yet.
            self.streamed = self.stage.guest_on_b.announced or self.cut_over
        self.audience.step_done(result)

    def note(self, text: str) -> None:
        """Pass it on."""
        self.audience.note(text)

    def progress(self, progress: Progress) -> None:
        """Pass it on."""
        self.audience.progress(progress)

    def finished(self, outcome: Outcome) -> None:
        """Pass it on."""
        self.audience.finished(outcome)


async def play(stage: Stage, report: Report, *, seconds: float, limits: Limits) -> Evidence:
    """Boot the guest on A, migrate it to B while it writes, let it verify its disk, and switch it off.

    The guest writes for ``seconds`` seconds before, and as long after, the migration.
    """
    witness = Witness(stage, report)
    async with Children() as children:
        log = stage.directory / "a.log"
        source = await children.start("A's QEMU", Host("A"), log, stage.source_qemu)
        await boot(stage.guest_on_a, source)
        report.note("the guest writes to its disk on A")
        await write_for(seconds, stage.guest_on_a)
        await migrate(stage.plan(limits), witness, base=stage.directory, children=children)
        report.note("the guest goes on writing on B")
        await write_for(seconds, stage.guest_on_b)
        report.note("the guest re-reads what it wrote")
        memory = await stage.guest_on_b.verify()
        leftovers = tuple(stage.leftovers())
        await stage.guest_on_b.stop()
    return Evidence(memory, witness.phases(memory.written), leftovers)


async def boot(guest: Guest, machine: Child) -> None:
    """Wait until the guest has found its disk; MigrationError if its QEMU ends first or it takes too long."""
    deadline = now() + BOOT_LIMIT
    while not guest.ready:
        if not machine.running:
            raise MigrationError(f"{machine.name} {await machine.wait()}")
        if now() > deadline:
            raise MigrationError(f"the guest did not boot within {BOOT_LIMIT:g} s; see {guest.console}")
        await asyncio.sleep(0.1)


async def write_for(seconds: float, guest: Guest) -> None:
    """Let the guest write for so long, and at least one record more."""
    number = guest.announced
    await asyncio.sleep(seconds)
    await guest.reach(number + 1, WRITE_LIMIT)


def judge(stage: Stage, evidence: Evidence) -> Verdict:
    """Compare on the host what the guest did not write, and join this with what the guest says."""
    extents = records.extents(evidence.memory.written, stage.cells)
    comparison = disk.compare(stage.original, stage.overlay, stage.layout, extents)
    return Verdict(evidence.memory, evidence.phases, comparison, evidence.leftovers, stage.cells)


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the subcommand's parser the demo's options."""
    parser.description = (
        "Migrate a Linux guest, which writes to its disk all the time, between two QEMUs on this machine, "
        "and check every block of its disk afterwards."
    )
    parser.add_argument("--size", default="1G", help="size of the guest's disk (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=8.0,
        metavar="S",
        help="how long the guest writes before and after the migration (default: %(default)g)",
    )
    parser.add_argument(
        "--engine",
        choices=["overlay", "qemu"],
        default="overlay",
        help="who copies the disk: nbd-overlay (the default), or the second QEMU",
    )
    parser.add_argument(
        "--channel",
        choices=CHANNELS,
        default="",
        help="how disk and RAM go, as for nbd-migrate run, over ports of the loopback (default: by Unix "
        "sockets)",
    )
    parser.add_argument("--speed", default="0", metavar="BYTES", help="stream at most so much per second")
    parser.add_argument(
        "--keep", type=filled_path, metavar="DIR", help="leave images, consoles and logs in DIR"
    )
    parser.add_argument("--cache", type=filled_path, metavar="DIR", help="where the guest's kernel is kept")


def main(arguments: argparse.Namespace) -> int:
    """Run the demo and return the exit code: 0 only when the verdict holds."""
    # A kill ends the demo as Ctrl-C does, and nothing is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A QEMU whose server is gone ends only after this delay, and after a kill everything is to end soon.
    limits = Limits(speed=parse_size(arguments.speed, "--speed"), reconnect_delay=1)
    size = parse_size(arguments.size, "--size")
    limits.check()
    # Before much is prepared in vain.
    from nbdserve.client import libnbd

    libnbd.load()
    with ExitStack() as stack:
        sockets = stack.enter_context(temporary_directory())
        keep = arguments.keep
        directory = stack.enter_context(kept_directory(keep)) if keep else sockets
        report = choose_report()
        stack.callback(report.close)
        report.note(f"a disk of {format_size(size)}, a guest, and two QEMUs, in {directory}")
        stage = prepare(
            directory,
            sockets,
            size,
            engine=arguments.engine,
            channel=arguments.channel,
            cache=arguments.cache,
        )
        try:
            playing = play(stage, report, seconds=arguments.seconds, limits=limits)
            evidence = clock.run(interruptible(playing))
        except asyncio.CancelledError:
            return EXIT_INTERRUPTED
        report.note("the host compares what the guest did not write")
        verdict = judge(stage, evidence)
        print("\n".join(["", *verdict.lines()]))
        return EXIT_DONE if verdict.holds else EXIT_FAILED


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 3600")
    return seconds
