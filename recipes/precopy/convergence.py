"""When the guest goes to B, by how the rounds of copying go: pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from recipes.plans.policy import AT_WINDOW, AUTO, CONVERGED, MANUAL, Cutover

HALF = 0.5
"""The part of a round that the next one may be, for another to be worth it."""


class Verdict(Enum):
    """What follows from a round."""

    AGAIN = "another round"
    CONVERGED = "little is left"
    DIVERGES = "the rounds no longer halve"
    ASKED = "it was asked for"


@dataclass(frozen=True)
class Look:
    """What is known at the end of a round.

    copied  bytes of the round
    dirty   bytes that the guest has changed since it began: the next round
    rest    seconds that it takes to copy that
    window  seconds that the window is expected to take if the guest goes now

    None while that is not known.
    """

    copied: int
    dirty: int
    rest: float | None
    window: float | None

    @property
    def halves(self) -> bool:
        """Tell whether the next round is at most half of this one."""
        return self.dirty <= self.copied * HALF


def judge(cutover: Cutover, look: Look) -> Verdict:
    """Return what follows from a round, unless somebody has asked for the cut-over."""
    if cutover.kind == MANUAL:
        return Verdict.AGAIN
    seconds, most = (look.window, cutover.window) if cutover.kind == AT_WINDOW else (look.rest, CONVERGED)
    if seconds is not None and seconds <= most:
        return Verdict.CONVERGED
    if cutover.kind == AUTO and not look.halves:
        return Verdict.DIVERGES
    return Verdict.AGAIN


@dataclass(frozen=True)
class Pace:
    """What the window is expected to be made of.

    rate    bytes per second at which the disks are copied; 0 while that is not known
    beside  seconds in which A is parted with, while they are copied
    after   seconds that it takes behind both: the last look at the images
    """

    rate: float
    beside: float
    after: float

    def rest(self, missing: int) -> float | None:
        """Return seconds in which so many bytes are copied; None if unknown."""
        if not missing:
            return 0.0
        return missing / self.rate if self.rate else None

    def window(self, missing: int) -> float | None:
        """Return seconds from the guest's start on B until so many bytes are there; None if unknown."""
        rest = self.rest(missing)
        return None if rest is None else max(self.beside, rest) + self.after
