"""Two versions side by side: whether one is slower, or the machine was only busy otherwise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CERTAINTY = 0.95
"""How often an interval holds what it is to hold."""


@dataclass(frozen=True)
class Comparison:
    """What one row gave: the rates of both versions, round by round."""

    name: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast we were in each round, the slowest first."""
        return sorted(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))

    @property
    def ratio(self) -> float:
        """How many times as fast we are: the median of the rounds."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """In which the ratio lies with CERTAINTY, however rounds scatter; of fewer than six, all of them."""
        ratios = self.ratios
        cut = ranks_to_cut(len(ratios))
        return ratios[cut], ratios[-1 - cut]

    def __str__(self) -> str:
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        low, high = self.interval
        figures = f"{ours:.4g} beside {theirs:.4g} {self.unit}"
        return f"{self.ratio:6.3f} [{low:.3f} to {high:.3f}]  {self.name}: {figures}"


def ranks_to_cut(rounds: int) -> int:
    """How many of the lowest, and of the highest, of so many values are outside the interval of their median.

    A value is below the true median as often as a coin shows heads: the sign test.
    """
    chance, rank = 2.0**-rounds, 0
    while (chance := chance + math.comb(rounds, rank + 1) / 2**rounds) <= (1 - CERTAINTY) / 2:
        rank += 1
    return rank
