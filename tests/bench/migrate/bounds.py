"""What was wanted of ours, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.migrate.contenders import HYBRID, POSTCOPY, STOCK
from tests.bench.migrate.hosts import Link
from tests.bench.migrate.sample import Sample, median

IN_MEMORY = "tmpfs"
"""The file system on which the disks are not the limit."""

MOST_BYTES = 1.3
"""Times the disk."""

MOST_WAIT = 1.0
"""Seconds of the guest's longest request while A lives."""

MOST_MISJUDGED = 0.25
"""Part of the window by which its prediction may be wrong."""

Samples = Mapping[str, Sequence[Sample]]
"""Of each contender, by its name."""


@dataclass(frozen=True)
class Verdict:
    """A bound, and what was measured, in the same unit."""

    what: str
    most: float
    measured: float

    @property
    def kept(self) -> bool:
        """Tell whether it holds."""
        return self.measured <= self.most


@dataclass(frozen=True)
class Ratio:
    """Most that a figure of ours may be, as a multiple of stock's."""

    ours: str
    what: str
    figure: Callable[[Sample], float]
    most: float


def ratios(link: Link, filesystem: str) -> Iterator[Ratio]:
    """Return the bounds beside stock on a link, with the disks on this file system."""
    yield Ratio(HYBRID.name, "window", lambda each: each.window, 0.1)
    yield Ratio(HYBRID.name, "downtime", lambda each: each.downtime, 1.5)
    if link.trip == 0.02:
        yield Ratio(POSTCOPY.name, "window", lambda each: each.window, 0.05)
    elif link.rate is None and filesystem == IN_MEMORY:
        yield Ratio(POSTCOPY.name, "window", lambda each: each.window, 2 / 3)
    else:
        yield Ratio(POSTCOPY.name, "window", lambda each: each.window, 1.0)


def verdicts(link: Link, filesystem: str, size: int, samples: Samples) -> Iterator[Verdict]:
    """Return all bounds of a link, as far as their contenders were measured."""
    for each in ratios(link, filesystem):
        if samples.get(each.ours) and samples.get(STOCK.name):
            theirs = median(samples[STOCK.name], each.figure)
            measured = median(samples[each.ours], each.figure) / theirs if theirs else 0.0
            yield Verdict(f"{each.ours}: {each.what}, as a multiple of stock's", each.most, measured)
    if ours := samples.get(HYBRID.name):
        what = f"{HYBRID.name}: error of the predicted window, as a part of what it took"
        yield Verdict(what, MOST_MISJUDGED, median(ours, lambda each: each.misjudged))
    for name in (POSTCOPY.name, HYBRID.name):
        if ours := samples.get(name):
            passed = median(ours, lambda each: each.passed) / size
            yield Verdict(f"{name}: bytes over the link, as a multiple of the disk", MOST_BYTES, passed)
            longest = max(each.longest for each in ours)
            yield Verdict(f"{name}: longest time without an answer to the guest, s", MOST_WAIT, longest)
