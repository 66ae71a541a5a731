"""What is found when the two QEMUs are asked, in the terms in which it is decided what to do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class OnA(Enum):
    """What A's QEMU says, and what that means there."""

    RUNS = "runs"
    """The guest runs, and nothing is under way."""
    RUNS_TOO = "runs although it has left"
    """The guest runs although the migration is ``completed``: somebody has told it to go on."""
    ANOTHER = "another QEMU"
    """A guest runs, in a QEMU that has never migrated: once ours was told to, this is not ours."""
    STANDS = "stands"
    """The guest is paused, and nothing is under way."""
    SENDS = "sends"
    """A migration is under way; the guest runs, or stood still before it."""
    HOLDS = "holds"
    """The guest stands still before the switch-over (``pre-switchover``)."""
    SWITCHES = "switches"
    """The switch-over is under way (``device``): it may end on either side in the next instant."""
    STUCK = "stuck"
    """The same, for longer than it was given."""
    LEFT = "left"
    """The migration is ``completed``: the guest is B's."""
    GONE = "gone"
    """There is no QEMU at A's monitor."""
    SILENT = "silent"
    """It cannot be reached, or does not answer."""


class OnB(Enum):
    """What B's QEMU says."""

    NONE = "none"
    """There is none, any more or yet."""
    STOPPED = "stopped"
    """There is none, and its image holds something: a guest has run here."""
    WAITS = "waits"
    """It does not have the guest, or not all of it (``inmigrate``)."""
    LATE = "late"
    """The same, for longer than it was given."""
    HAS_GUEST = "has the guest"
    """Whether that runs, is paused or has been shut down."""
    SILENT = "silent"
    """It cannot be reached, or does not answer."""


@dataclass(frozen=True)
class Facts:
    """What was found."""

    a: OnA
    b: OnB
