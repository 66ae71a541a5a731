"""What the operator sees of a migration: lines, and on a terminal a bar while the disk is streamed."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.progress_bar import ProgressBar
from rich.text import Text

from nbdserve.common.standard_streams import silence
from recipes.errors import MigrationError
from recipes.migrate.progress import (
    Moment,
    Outcome,
    PrecopyProgress,
    Progress,
    RamProgress,
    Report,
    Step,
    StepResult,
)

INTERVAL = 5.0
"""Seconds between two lines of progress where there is no terminal."""

MIB = 1 << 20


class PlainReport(Report):
    """Prints a line for everything that happens, with the seconds since the beginning."""

    def __init__(self, out: TextIO | None = None) -> None:
        """``out`` is standard output by default."""
        self._out = out or sys.stdout
        self._begin = time.monotonic()
        self._next_progress = self._next_ram = 0.0

    def step_started(self, step: Step) -> None:
        self._line(f"step {step.number}  {step.title} ...")

    def step_done(self, result: StepResult) -> None:
        self._line(f"step {result.step.number}  {result.summary} [{result.seconds:.1f} s]")

    def moment(self, moment: Moment) -> None:
        self._line(f"        {moment.value}")

    def note(self, text: str) -> None:
        self._line(f"        {text}")

    def progress(self, progress: Progress) -> None:
        if time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + INTERVAL
            self._line(f"        {describe(progress)}")

    def ram(self, progress: RamProgress) -> None:
        # What is over in a moment is not worth a line.
        self._next_ram = self._next_ram or time.monotonic() + INTERVAL
        if time.monotonic() >= self._next_ram:
            self._next_ram = time.monotonic() + INTERVAL
            self._line(f"        {describe_ram(progress)}")

    def precopy(self, progress: PrecopyProgress) -> None:
        if time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + INTERVAL
            self._line(f"        {describe_precopy(progress)}")

    def finished(self, outcome: Outcome) -> None:
        self._line(summary(outcome))

    def close(self) -> None:
        """Leave the output in order, whatever has happened."""

    def _line(self, text: str) -> None:
        try:
            print(f"{time.monotonic() - self._begin:7.1f} s  {text}", file=self._out, flush=True)
        except OSError:
            # Nobody reads any more, or the disk is full: no reason to stop a migration half-way.
            silence(self._out)


class TerminalReport(PlainReport):
    """The same, with a bar while the RAM moves and the disk is streamed."""

    def __init__(self, out: TextIO | None = None) -> None:
        super().__init__(out)
        self._console = Console(file=self._out)
        self._bar: Bar | None = None

    def progress(self, progress: Progress) -> None:
        self._show(progress.done, progress.total, describe(progress))

    def ram(self, progress: RamProgress) -> None:
        # Of what QEMU sends there is no whole, as the guest goes on changing it.
        self._show(0, None, describe_ram(progress))

    def precopy(self, progress: PrecopyProgress) -> None:
        self._show(progress.done, progress.total, describe_precopy(progress))

    def _show(self, done: int, total: int | None, text: str) -> None:
        try:
            if self._bar is None:
                columns = (BarColumn(), TextColumn("{task.description}", markup=False))
                # Refreshed here: a thread would die, aloud, with a terminal that has hung up.
                self._bar = Bar(*columns, console=self._console, transient=True, auto_refresh=False)
                self._bar.add_task("", total=total)
                self._bar.start()
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=done, total=total, description=text, refresh=True)
        except OSError:
            silence(self._out)

    def close(self) -> None:
        """Give the terminal back."""
        bar, self._bar = self._bar, None
        if bar:
            try:
                bar.stop()
            except OSError:
                silence(self._out)

    def _line(self, text: str) -> None:
        # The bar gives way to every line and comes back with the next progress.
        self.close()
        super()._line(text)


class JsonReport(PlainReport):
    """Lines on standard error, and at the end the outcome as one JSON object on standard output."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def finished(self, outcome: Outcome) -> None:
        """Print the outcome; a step by its number and its title. MigrationError when that cannot be done."""
        super().finished(outcome)
        values = dataclasses.asdict(outcome)
        values["steps"] = [
            {"number": r.step.number, "title": r.step.title, "seconds": r.seconds, "summary": r.summary}
            for r in outcome.steps
        ]
        try:
            print(json.dumps(values), flush=True)
        except OSError as error:
            silence(sys.stdout)
            raise MigrationError(
                "the guest has moved to B with its disk, and A is not needed any more; only the outcome "
                f"could not be written to standard output: {error.strerror}"
            ) from error


class Board:
    """What is known of a migration, whenever it changes: on a terminal in one place, with a bar."""

    def __init__(self, terminal: TextIO | None) -> None:
        self._live: Live | None = None
        if terminal is not None:
            # Refreshed here, as the bar of a run is.
            self._live = Live(console=Console(file=terminal), auto_refresh=False)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, text: str, progress: Progress | None) -> None:
        """Show this in the place of what was shown."""
        if self._live is None:
            print(text, flush=True)
            return
        shown: list[RenderableType] = [Text(text)]
        if progress is not None:
            shown.append(ProgressBar(progress.total, progress.done, width=60))
        self._live.update(Group(*shown), refresh=True)


def choose_report(*, as_json: bool = False) -> PlainReport:
    """Return the report that suits standard output."""
    if as_json:
        return JsonReport()
    return TerminalReport() if sys.stdout.isatty() else PlainReport()


def describe(progress: Progress) -> str:
    """Return one line about the stream: bytes, rate, time left, vulnerable window."""
    left = progress.left
    verified = f"  {progress.verified / MIB:.0f} MiB compared with A" if progress.verified else ""
    needed = f"  A needed for {progress.needed / MIB:.1f} MiB" if progress.needed is not None else ""
    return (
        f"{progress.done / MIB:.0f} of {progress.total / MIB:.0f} MiB  {progress.rate / MIB:.1f} MiB/s  "
        f"{'--' if left is None else f'{left:.0f} s'} left  window {progress.window:.0f} s{needed}{verified}"
    )


def describe_ram(progress: RamProgress) -> str:
    """Return one line about the RAM."""
    rounds = f"  round {progress.rounds}" if progress.rounds > 1 else ""
    return (
        f"RAM: {progress.sent / MIB:.0f} MiB sent, {progress.missing / MIB:.0f} MiB to go  "
        f"{progress.rate / MIB:.1f} MiB/s{rounds}"
    )


def describe_precopy(progress: PrecopyProgress) -> str:
    """Return one line about the copying before the cut-over."""
    window = progress.window
    return (
        f"pre-copy round {progress.number}: {progress.done / MIB:.0f} of {progress.total / MIB:.0f} MiB  "
        f"{progress.rate / MIB:.1f} MiB/s  {progress.dirty / MIB:.1f} MiB changed since  window "
        f"{'--' if window is None else f'{window:.1f} s'} if the guest went now"
    )


def summary(outcome: Outcome) -> str:
    """Return one line about a migration that is complete."""
    seeded = f" ({outcome.seeded / MIB:.0f} MiB of it from seeds)" if outcome.seeded else ""
    verified = ""
    if outcome.verified or outcome.written:
        verified = f", {outcome.verified / MIB:.0f} MiB verified ({outcome.written / MIB:.0f} the guest's)"
    predicted, before = "", ""
    if outcome.predicted is not None:
        predicted = f" (predicted {outcome.predicted:.1f} s)"
        rounds = "one round" if outcome.rounds == 1 else f"{outcome.rounds} rounds"
        before = f"{outcome.precopied / MIB:.0f} MiB copied in {rounds} before the cut-over, "
    return (
        f"done: downtime {outcome.downtime_ms} ms, {outcome.disk_bytes / MIB:.0f} MiB of disk on B"
        f"{seeded}{verified}, {before}vulnerable window {outcome.window:.1f} s{predicted}, "
        f"interrupted {outcome.recoveries} times"
    )
