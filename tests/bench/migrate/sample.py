"""What one migration has shown, and what several of them say together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from tests.bench.migrate.guest import Done
from tests.bench.migrate.setting import Moved, MoveError


class Phase(Enum):
    """Of the guest's life: before the migration, until nothing on A is needed, and after that."""

    BEFORE = "before"
    DURING = "during"
    AFTER = "after"


KINDS = {"w": "write", "r": "read"}


@dataclass(frozen=True)
class Latency:
    """Of the requests of a kind in a phase, in seconds."""

    median: float
    p99: float
    longest: float


@dataclass(frozen=True)
class Sample:
    """One migration; times are in seconds.

    cut_over   from the beginning until the guest works on B
    downtime   as A's QEMU tells it
    gap        from the last request that the guest had answered on A to the first one on B
    window     from the cut-over until nothing on A is needed
    total      from the beginning until the command has ended
    passed     bytes over the link, both directions, RAM and disk
    misjudged  by which part of itself the window was predicted wrongly; 0 where none was predicted
    latencies  by phase and kind ("w", "r"), by the guest's clock
    """

    cut_over: float
    downtime: float
    gap: float
    window: float
    total: float
    passed: int
    latencies: Mapping[tuple[Phase, str], Latency]
    misjudged: float = 0.0

    @property
    def longest(self) -> float:
        """The longest that the guest waited for a request, or stood still, from the beginning on."""
        waited = [each.longest for (phase, _), each in self.latencies.items() if phase is not Phase.BEFORE]
        return max(self.gap, *waited)


def sample(moved: Moved, done: Sequence[Done], passed: int) -> Sample:
    """Judge a migration by what the guest has told; MoveError where that is nothing on one of the hosts."""
    if silent := {"a", "b"} - {each.host for each in done}:
        raise MoveError(f"the guest has told of no request on {', '.join(sorted(silent))}")
    last = max(each.at for each in done if each.host == "a")
    first = min(each.at for each in done if each.host == "b")
    # A mirror leaves nothing on A that is needed.
    free = max(moved.free, first) if moved.window else first
    return Sample(
        cut_over=first - moved.began,
        downtime=moved.downtime_ms / 1000,
        gap=first - last,
        window=free - first,
        total=moved.ended - moved.began,
        passed=passed,
        misjudged=moved.misjudged or 0.0,
        latencies={
            (phase, kind): latency(
                [
                    each.seconds
                    for each in done
                    if each.kind == kind and phase_of(each, moved.began, free) is phase
                ]
            )
            for phase in Phase
            for kind in KINDS
        },
    )


def phase_of(each: Done, began: float, free: float) -> Phase:
    """Return the phase in which a request was answered."""
    if each.at < began:
        return Phase.BEFORE
    return Phase.DURING if each.at <= free else Phase.AFTER


def latency(seconds: Sequence[float]) -> Latency:
    """Return what is to be said of so many requests; of none: zero."""
    ordered = sorted(seconds) or [0.0]
    return Latency(statistics.median(ordered), ordered[int(len(ordered) * 0.99)], ordered[-1])


def median(samples: Sequence[Sample], figure: Callable[[Sample], float]) -> float:
    """Return the median of a figure."""
    return statistics.median(map(figure, samples))
