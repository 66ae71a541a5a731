"""What a migration tells: the six steps, their results, and the progress of the stream.

A Report is told; it decides what to print and where. The base class prints nothing.

Who has the guest after a failure is not told here: that sentence belongs to the decision, in decide.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Step(Enum):
    """The six steps; ``number`` is what the operator sees, ``title`` says what is done."""

    EXPORT = (1, "export the source's disk")
    OVERLAY = (2, "create the overlay")
    LAUNCH = (3, "launch the destination")
    MIGRATE = (4, "migrate")
    STREAM = (5, "stream the disk")
    SHUTDOWN = (6, "shut the server down, fence the source")

    def __init__(self, number: int, title: str) -> None:
        self.number = number
        self.title = title


class Moment(Enum):
    """Instants within a step: between two of step 4 the guest changes sides, in step 6 it lets go of A."""

    SWITCHOVER = "the guest stands still on A"
    ARRIVED = "the guest runs on B"
    PIVOTED = "the guest on B uses nothing but its own disk"


@dataclass(frozen=True)
class StepResult:
    """A step that is done: how long it took, in seconds, and one line about what it did."""

    step: Step
    seconds: float
    summary: str


@dataclass(frozen=True)
class Progress:
    """How far the stream is: bytes done, bytes in all, bytes per second, seconds since the cut-over.

    ``left`` are the seconds until the end, None while that is not known, or nothing moves. ``verified`` are
    the bytes that have been looked at to compare them with A's. ``needed`` are the bytes that are not on
    stable storage on B: 0 when A may be switched off. None where nobody tells that, as B's QEMU does not.
    """

    done: int
    total: int
    rate: float
    window: float
    left: float | None = None
    verified: int = 0
    needed: int | None = None

    @property
    def missing(self) -> int:
        """Return how many bytes are to come."""
        return max(0, self.total - self.done)


@dataclass(frozen=True)
class RamProgress:
    """How far the RAM is: bytes sent, bytes to go, bytes per second, and how often QEMU has begun anew."""

    sent: int
    missing: int
    rate: float
    rounds: int


@dataclass(frozen=True)
class PrecopyProgress:
    """How far the copying before the cut-over is.

    number    of the round; 0 is the first one, of everything
    done      bytes of all that was to be copied until now
    total     all that
    rate      bytes per second
    dirty     bytes that the guest has changed since the round began, which are for the next one
    window    seconds that the window is expected to take if the guest goes now; None while that is not known
    """

    number: int
    done: int
    total: int
    rate: float
    dirty: int
    window: float | None = None

    @property
    def missing(self) -> int:
        """Return how many bytes of this round are to come."""
        return max(0, self.total - self.done)


@dataclass(frozen=True)
class Outcome:
    """A migration that is complete.

    downtime_ms    how long the guest stood still, as the source's QEMU reports it, in milliseconds
    migrate_ms     from the migrate command to the end of the RAM, in milliseconds, as QEMU reports it
    ram_bytes      bytes sent over the migration connection
    disk_bytes     size of the disk, all of which the stream has made local
    window         seconds from the cut-over until nothing on A was needed any more
    recoveries     how often the stream was interrupted and taken up again
    precopied      bytes that were copied before the cut-over
    rounds         in so many rounds
    predicted      what the window was expected to be, in seconds, when the guest stood still; None where
                   nothing was
    added_ms       for how much of the downtime the guest waited for the last bitmap, in milliseconds
    seeded         bytes of the disk that B had already, and that were not sent
    verified       bytes that were compared on both hosts in the end, and are equal
    written        bytes that were left out of that, as the guest had written in their blocks
    """

    steps: tuple[StepResult, ...]
    downtime_ms: int
    migrate_ms: int
    ram_bytes: int
    disk_bytes: int
    window: float
    recoveries: int
    precopied: int = 0
    rounds: int = 0
    predicted: float | None = None
    added_ms: int = 0
    seeded: int = 0
    verified: int = 0
    written: int = 0


class Report:
    """Is told what happens; this one keeps silent. Every method may be overridden."""

    def step_started(self, step: Step) -> None:
        """A step begins."""

    def step_done(self, result: StepResult) -> None:
        """A step is complete."""

    def moment(self, moment: Moment) -> None:
        """The cut-over has come this far. The guest waits for this to return: be quick."""

    def note(self, text: str) -> None:
        """Something worth a line happened within a step."""

    def progress(self, progress: Progress) -> None:
        """The stream has moved on; called about twice a second."""

    def ram(self, progress: RamProgress) -> None:
        """The RAM has moved on; called about twice a second."""

    def precopy(self, progress: PrecopyProgress) -> None:
        """The copying before the cut-over has moved on; called a few times a second."""

    def finished(self, outcome: Outcome) -> None:
        """The migration is complete."""
