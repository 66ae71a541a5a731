"""What a process holds, sampled over a long run, and whether that stays the same."""

from __future__ import annotations

import os
import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tests.support.disks import KIB

WARM_UP = 0.2
"""The part of the samples, from the first on, in which pools and arenas may still fill."""


class Sample(NamedTuple):
    """What a process holds at one moment."""

    memory: int
    """Resident, in bytes."""
    descriptors: int
    threads: int


def sample(pid: int) -> Sample:
    """Look at a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(int(status["VmRSS"].split()[0]) * KIB, descriptors, int(status["Threads"]))


class Watch:
    """Samples a process every so many seconds until the block ends: ``peak`` is the most of each."""

    def __init__(self, pid: int, interval: float = 0.5) -> None:
        self._pid = pid
        self._interval = interval
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.peak = sample(pid)
        self.samples = 0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(self._interval):
            self.peak = Sample(*map(max, self.peak, sample(self._pid)))
            self.samples += 1


@dataclass(frozen=True)
class Trend:
    """How a quantity went over the samples after the warm-up."""

    slope: float
    """Least squares, times the length of the run: how much it grows from the first sample to the last."""
    step: float
    """The median of the last quarter, less that of the first."""

    def is_flat(self, tolerance: float) -> bool:
        """Whether it grew by no more than the tolerance, either way of looking. To shrink is no fault."""
        return max(self.slope, self.step) <= tolerance


def trend(values: Sequence[float]) -> Trend:
    """The trend of at least five values, one for each equal part of a run."""
    kept = values[int(len(values) * WARM_UP) :]
    quarter = max(1, len(kept) // 4)
    slope = statistics.linear_regression(range(len(kept)), kept).slope
    step = statistics.median(kept[-quarter:]) - statistics.median(kept[:quarter])
    return Trend(slope * (len(kept) - 1), step)
