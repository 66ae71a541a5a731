"""The state of a migration: one immutable value, which is what the journal keeps.

Whoever takes a migration over reads this, and asks the hosts for the rest (recipes/qemu/facts.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Self

from nbdserve.common.errors import UsageError
from recipes.errors import MigrationError
from recipes.migrate.decoding import decoded
from recipes.plans.channel import PLAIN
from recipes.plans.disks import PlannedDisk, away
from recipes.plans.hooks import Hook
from recipes.plans.limits import GONE
from recipes.plans.plan import Plan
from recipes.plans.policy import HYBRID
from recipes.qemu.bitmaps import Tracking
from recipes.qemu.credentials import Parameters

VERSION = 1
"""Of the journal's lines; another is refused."""

LATEST = float(1 << 38)
"""Seconds since the epoch that can be told as a date."""


class Phase(Enum):
    """What is about to be done, or under way. Each is in the journal before its first action."""

    PREPARED = "prepared"
    """The checks have passed; nothing has been started."""
    EXPORT = "export"
    OVERLAY = "overlay"
    LAUNCH = "launch"
    PRECOPY = "pre-copy"
    """Policy hybrid: the disk is copied while the guest runs on A, in rounds."""
    MIGRATE = "migrate"
    """A's QEMU is told to migrate."""
    SWITCH_OVER = "switch-over"
    """The guest stands still on A, and A's QEMU is told to go on."""
    ARRIVED = "arrived"
    """The guest is B's; A's disk is fenced and A's QEMU ended."""
    STREAM = "stream"
    COMPLETE = "complete"
    """Every block is on B, on stable storage; the guest moves to the file itself."""
    SHUT_DOWN = "shut-down"
    """Nothing is needed of A; what was started there is ended."""
    DONE = "done"
    TAKING_BACK = "taking-back"
    """B's QEMU is ended; then the guest goes on on A."""
    TAKEN_BACK = "taken-back"
    """The guest is A's."""
    LOST = "lost"
    """A's QEMU ended while it had the guest."""
    RECOVERING = "recovering"
    """B is lost: what the guest wrote there is being written to A's images, which are no disks meanwhile."""
    RECOVERED = "recovered"
    """A's images are the guest's disks again, with all that it wrote on B."""


OVER = frozenset({Phase.DONE, Phase.TAKEN_BACK, Phase.LOST, Phase.RECOVERED})
"""It is known where the guest is, and stays."""

BEFORE = frozenset(
    {
        *(Phase.PREPARED, Phase.EXPORT, Phase.OVERLAY, Phase.LAUNCH, Phase.PRECOPY),
        *(Phase.MIGRATE, Phase.SWITCH_OVER, Phase.TAKING_BACK),
    }
)
"""The guest is not known to be B's."""


class Role(Enum):
    """What a process does for a migration; the value is what its log and its pid file are called."""

    SERVER = "nbdserve"
    """nbdserve on A."""
    FENCE = "fence"
    """On A."""
    OVERLAY = "overlay"
    """nbd-overlay on B."""
    QEMU = "qemu"
    """On B."""
    TUNNEL = "tunnel"
    """Where the orchestrator runs: what leads through ssh from one host to the other."""
    CHANNEL = "channel"
    """On B: the end of the single channel; the other one is A's server."""


PER_DISK = frozenset({Role.OVERLAY})
"""Roles of which there is one process for each disk."""


NAMES = {
    Role.SERVER: "the server on A",
    Role.FENCE: "the fence on A",
    Role.OVERLAY: "nbd-overlay on B",
    Role.QEMU: "B's QEMU",
    Role.TUNNEL: "the tunnel",
    Role.CHANNEL: "the channel's end on B",
}
"""What messages call the processes of a migration of one disk."""


def called(role: Role, plan: Plan, drive: str = "") -> str:
    """Return what messages call a process: of several disks' processes each by its disk's drive."""
    if role in PER_DISK and len(plan.disks) > 1:
        return NAMES[role].replace(" on ", f" of {drive} on ")
    return NAMES[role]


@dataclass(frozen=True)
class Disk:
    """One of the guest's disks, and how far it has come: a path on each host, and its size in bytes."""

    source: str
    target: str
    size: int
    file: str = ""
    """What tells A's image from any other, and how long it was, as hosts/images.files_at() says."""
    moved: str = ""
    """Where A's image is since its guest has left, or is about to be; empty: it stays at ``source``."""
    complete: bool = False
    """Every block is on B, on stable storage."""
    seeded: int = 0
    """Bytes that came from its seed, as nbd-overlay has told in the end."""
    verified: int = 0
    """Bytes that were compared on both hosts, and are equal."""
    written: int = 0
    """Bytes that were left out of that, as the guest has written in their blocks on B."""

    @property
    def on_a(self) -> str:
        """Return where A's image is, as far as is known."""
        return self.moved or self.source

    @property
    def away(self) -> str:
        """Return where A's image is moved to when its guest has left; nothing for a block device."""
        return away(self.source)


@dataclass(frozen=True)
class Process:
    """A process that was started: its id on its host, and what its command line has and no other's.

    ``disk`` is the drive of the one that it is for; empty: it is for all of them, or for the only one.
    """

    role: Role
    pid: int
    mark: str
    disk: str = ""


@dataclass(frozen=True)
class Certificates:
    """Directories on A and on B with what was made for this migration; empty: none."""

    a: str
    b: str


@dataclass(frozen=True)
class Tunnel:
    """Sockets on A of what carries disk and RAM: that at which A's server listens, and that to which A's QEMU
    sends its guest.

    Of the single channel the former is none, and there is a monitor of A's server. Those on B are the plan's.
    """

    disk: str
    ram: str
    monitor: str = ""


@dataclass(frozen=True)
class Round:
    """A round of copying before the cut-over: bytes that were to be copied, and the seconds that it took."""

    number: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Prediction:
    """What the window was expected to be when the guest stood still.

    missing  bytes that had to follow it
    seconds  from its start on B until nothing of A would be needed
    added    seconds for which it stood still for the last bitmap
    """

    missing: int
    seconds: float
    added: float


@dataclass(frozen=True)
class Arrival:
    """What A's QEMU says of a migration that is complete: milliseconds, and bytes sent."""

    downtime_ms: int
    total_ms: int
    ram_bytes: int


@dataclass(frozen=True)
class State:
    """A migration. Times are in seconds since the epoch."""

    name: str
    plan: Plan
    phase: Phase = Phase.PREPARED
    disks: tuple[Disk, ...] = ()
    """One cut-over is for all of them."""
    processes: tuple[Process, ...] = ()
    capabilities: tuple[str, ...] = ()
    """Migration capabilities that were on at A before."""
    devices: tuple[str, ...] = ()
    """Those of A's QEMU when it was looked at; empty: nobody has."""
    command: tuple[str, ...] = ()
    """What starts the guest on A as it was started there; empty: that is not known."""
    certificates: Certificates | None = None
    tunnel: Tunnel | None = None
    """What there is of it, or may be, besides its process."""
    parameters: Parameters = field(default_factory=Parameters)
    """The migration parameters of A before, of those that say how to use TLS."""
    downtime_limit: int = 0
    """A's ``downtime-limit`` before, in milliseconds; 0: nobody has changed it."""
    tracking: Tracking | None = None
    """Policy hybrid: the bitmaps on A."""
    rounds: tuple[Round, ...] = ()
    """The last of those before the cut-over."""
    precopied: int = 0
    """Bytes that were copied in all of them."""
    prediction: Prediction | None = None
    exporter: str = ""
    """The directory on A of the socket at which A's QEMU serves its disks to A's server, or may do so."""
    made: tuple[str, ...] = ()
    """Paths on B of what was made there, or may have been; none once the guest is B's."""
    finish: str = ""
    """What the operator types to do what is left when the guest is on B."""
    arrival: Arrival | None = None
    paused: bool = False
    """Somebody had paused the guest on A, and so it came to B."""
    arrived: float = 0.0
    """When the guest became B's; 0 before."""
    window: float = 0.0
    """Seconds from then until nothing on A was needed any more; 0 before."""
    hooks_begun: tuple[Hook, ...] = ()
    hooks_ended: tuple[Hook, ...] = ()
    """One that has begun, and has not ended, was interrupted."""
    finish_by: float = 0.0
    """When the stream is to have ended, which chooses its speed; 0: the plan's speed counts."""
    recoveries: int = 0
    """How often the stream was interrupted and taken up again."""
    time: float = 0.0
    """When the journal was told."""

    @property
    def complete(self) -> bool:
        """Tell whether nothing of A is needed any more."""
        return bool(self.disks) and all(disk.complete for disk in self.disks)

    @property
    def over(self) -> bool:
        """Tell whether nothing is left to be done, nor of what was made."""
        return self.phase in OVER and self.is_clear

    @property
    def is_clear(self) -> bool:
        """Tell whether nothing that was started or made is left, as far as is known."""
        made = self.processes or self.made or self.exporter or self.certificates or self.tunnel
        return not (made or self.tracking)

    @property
    def gives_way(self) -> bool:
        """Tell whether another migration of this name may begin: B has nothing of this one, and A's QEMU says
        where the guest is, or it is known to be elsewhere."""
        return self.is_clear and self.phase in OVER | BEFORE

    @property
    def standing(self) -> str:
        """Return what is wrong with one that is not over, on which nobody acts, and what is typed.

        It names ``abort`` as long as the guest may be on A: afterwards that refuses."""
        back = f"nbd-migrate abort {self.name}"
        if self.phase in OVER:
            return f"has left something behind ({self.phase.value}): {back} clears it away"
        onward = f"is not over ({self.phase.value}): {self.onward} takes it up"
        return f"{onward}, {back} takes it back" if self.phase in BEFORE else onward

    @property
    def onward(self) -> str:
        """Return the command that goes on with it where nobody acts on it."""
        recovering = self.phase is Phase.RECOVERING
        return f"nbd-migrate {f'recover {self.name} --on a' if recovering else f'resume {self.name}'}"

    def disk(self, planned: PlannedDisk) -> Disk:
        """Return how far a disk of the plan has come."""
        return next(each for each in self.disks if each.target == planned.target)

    @property
    def pending(self) -> tuple[PlannedDisk, ...]:
        """Return the disks that still need A."""
        return tuple(each for each in self.plan.disks if not self.disk(each).complete)

    def with_complete(self, planned: PlannedDisk) -> tuple[Disk, ...]:
        """Return the disks, of which this one is complete now."""
        whole = replace(self.disk(planned), complete=True)
        return tuple(whole if each.target == planned.target else each for each in self.disks)

    def with_moved(self, moved: Sequence[str] = ()) -> tuple[Disk, ...]:
        """Return the disks, whose images are at these paths of A, or without any go where ``away`` says."""
        paths = moved or [disk.away for disk in self.disks]
        return tuple(replace(disk, moved=path) for disk, path in zip(self.disks, paths, strict=True))

    @property
    def departures(self) -> list[tuple[str, str]]:
        """Return each of A's images, with words that say where the guest has that disk instead."""
        host = self.plan.destination.host or "B"
        return [(disk.source, f"{host}:{disk.target}") for disk in self.disks]

    def with_facts(
        self, planned: PlannedDisk, *, seeded: int, verified: int, written: int
    ) -> tuple[Disk, ...]:
        """Return the disks, with what is known of this one when it has been copied."""
        known = replace(self.disk(planned), seeded=seeded, verified=verified, written=written)
        return tuple(known if each.target == planned.target else each for each in self.disks)

    @property
    def seeded(self) -> int:
        """Return how many bytes came from seeds."""
        return sum(disk.seeded for disk in self.disks)

    def process(self, role: Role, drive: str = "") -> Process | None:
        """Return the process in a role, for a disk where there is one for each, if one was started."""
        return next((each for each in self.processes if each.role is role and each.disk in ("", drive)), None)

    def with_process(self, process: Process) -> Self:
        """Return the state with a process that takes the place of the one in the same role."""
        old = self.process(process.role, process.disk)
        return replace(self, processes=(*(each for each in self.processes if each is not old), process))

    def to_json(self) -> str:
        """Return the state on one line."""
        values = {"version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(values, default=_value_of, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Return the state that a line tells of. Raises MigrationError for what no version of ours has
        written.
        """
        try:
            values = json.loads(line)
            if values.pop("version") != VERSION:
                raise MigrationError("the state of a migration was written by another version of nbd-migrate")
            for limit in GONE:
                values["plan"]["limits"].pop(limit, None)
            # Before there was anything else, all went as it was.
            values["plan"].setdefault("channel", {"kind": PLAIN})
            finish = values["plan"]["finish"]
            if values["plan"]["destination"].get("policy") == HYBRID and finish.get("verify") is None:
                # Before that was its default; A's server tells no hashes then.
                finish["verify"] = False
            state = decoded(cls, values)
        except (UsageError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MigrationError(f"not a state of a migration: {error}") from error
        if [disk.target for disk in state.disks] != [disk.target for disk in state.plan.disks]:
            raise MigrationError("not a state of a migration: its disks are not those of its plan")
        if not all(0 <= each < LATEST for each in (state.time, state.arrived, state.finish_by)):
            raise MigrationError("not a state of a migration: its times are none")
        return state


def entered(state: State, phase: Phase, *, cleared: bool = False) -> State:
    """Return the state at the beginning of a phase; ``cleared``: nothing is left of what was made."""
    if cleared:
        state = replace(state, made=(), processes=(), certificates=None, exporter="")
        state = replace(state, tunnel=None, tracking=None)
    return replace(state, phase=phase)


def _value_of(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{value!r} has no place in a journal")
