"""What is told of a mirror."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class MirrorState(Enum):
    """Whether the mirror follows."""

    IN_SYNC = "in-sync"
    """What the guest writes goes there as it comes."""
    BEHIND = "behind"
    """It is away, or what it lacks is being read again: what it holds is as old as the lag says."""
    LOST = "lost"
    """It cannot be this disk's mirror, or the disk has none any more."""


@dataclass(frozen=True)
class MirrorStatus:
    """How a mirror is, at one moment."""

    uri: str
    state: MirrorState
    trouble: str
    """Why it does not follow, in a few words; empty when it does."""
    point: int
    """The number of the point that it holds; 0: none that is known here."""
    point_time: float
    """When that was, in seconds since 1970; 0 where there is none."""
    points: int
    """How many it has got from this process."""
    lag_bytes: int
    """Changes that it lacks, at most."""
    lag_seconds: float
    """How long ago the first of them was made; 0 if it lacks none."""
    sent: int
    """Bytes that this process has sent there."""
