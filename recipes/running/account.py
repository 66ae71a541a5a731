"""What a migration was like, as its journal and its samples tell: one value, for the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from recipes.migrate.state import OVER, Disk, Phase, Round, State
from recipes.running.samples import Sample
from recipes.running.window import Window


@dataclass(frozen=True)
class Stretch:
    """A phase: since when, and for how many seconds; 0 for the last one of a migration that is over."""

    phase: Phase
    begin: float
    seconds: float


@dataclass(frozen=True)
class Waits:
    """What requests of the guest have waited for A lately: how many, and how long on average, in seconds."""

    time: float
    requests: int
    seconds: float


@dataclass(frozen=True)
class Account:
    """A migration, in bytes and seconds, times since the epoch; what is not known, or not yet, is None.

    downtime  how long the guest stood still, as A's QEMU has told
    ram_time  how long its RAM took
    window    from the cut-over until nothing on A was needed, or until now
    needed    bytes that are not on stable storage on B: 0 when A may be switched off
    left      until then, as the rate of late predicts
    rate      of the disk, from the cut-over on, on average
    precopied bytes that were copied before it, in rounds, of which these are the last
    predicted what the window was expected to be, when the guest stood still
    verifies  what was copied is compared on both hosts
    """

    name: str
    phase: Phase
    begin: float
    end: float
    stretches: tuple[Stretch, ...]
    disks: tuple[Disk, ...]
    verifies: bool
    downtime: float | None
    ram_time: float | None
    ram_bytes: int | None
    cut_over: float | None
    window: float | None
    needed: int | None
    left: float | None
    rate: float | None
    precopied: int
    rounds: tuple[Round, ...]
    predicted: float | None
    interruptions: int
    hooks_begun: tuple[str, ...]
    hooks_ended: tuple[str, ...]
    samples: tuple[Sample, ...]
    waits: tuple[Waits, ...]

    @property
    def disk_bytes(self) -> int:
        """Return the size of the disks."""
        return sum(disk.size for disk in self.disks)

    def to_json(self) -> dict[str, Any]:
        """Return it as values that JSON has."""
        values = dataclasses.asdict(self)
        values["phase"] = self.phase.value
        for stretch in values["stretches"]:
            stretch["phase"] = stretch["phase"].value
        return values


def account(
    history: Sequence[State], samples: Sequence[Sample], now: float, needed: Window | None = None
) -> Account:
    """Return what the states of a migration, at least one, its samples and its window tell at a time."""
    state = history[-1]
    end = state.time if state.phase in OVER else max(now, state.time)
    arrival = state.arrival
    cut_over = state.arrived or None
    window = None
    if cut_over:
        window = state.window or max(0.0, end - cut_over)
    ours = tuple(sample for sample in samples if history[0].time <= sample.time <= end)
    return Account(
        name=state.name,
        phase=state.phase,
        begin=history[0].time,
        end=end,
        stretches=tuple(_stretches(history, end)),
        disks=state.disks,
        verifies=state.plan.verifies,
        downtime=arrival.downtime_ms / 1000 if arrival else None,
        ram_time=arrival.total_ms / 1000 if arrival else None,
        ram_bytes=arrival.ram_bytes if arrival else None,
        cut_over=cut_over,
        window=window,
        needed=needed.bytes if needed else None,
        left=needed.left if needed else None,
        rate=_rate(ours, state, window),
        precopied=state.precopied,
        rounds=state.rounds,
        predicted=state.prediction.seconds if state.prediction else None,
        interruptions=state.recoveries,
        hooks_begun=tuple(hook.value for hook in state.hooks_begun),
        hooks_ended=tuple(hook.value for hook in state.hooks_ended),
        samples=ours,
        waits=tuple(_waits(ours)),
    )


def _stretches(history: Sequence[State], end: float) -> list[Stretch]:
    """Return the phases, each once for as long as it was followed by no other."""
    begun: list[tuple[Phase, float]] = []
    for state in history:
        if not begun or begun[-1][0] is not state.phase:
            begun.append((state.phase, state.time))
    ends = [*(time for _, time in begun[1:]), end]
    # A clock may have been set back.
    return [
        Stretch(phase, time, max(0.0, until - time)) for (phase, time), until in zip(begun, ends, strict=True)
    ]


def _rate(samples: Sequence[Sample], state: State, window: float | None) -> float | None:
    if state.complete and window:
        followed = state.prediction.missing if state.prediction else sum(disk.size for disk in state.disks)
        return followed / window
    if len(samples) < 2 or samples[-1].time <= samples[0].time:
        return None
    return max(0.0, (samples[-1].done - samples[0].done) / (samples[-1].time - samples[0].time))


def _waits(samples: Sequence[Sample]) -> list[Waits]:
    """Return what was waited between each two samples, where something was."""
    found = []
    for before, after in pairwise(samples):
        requests = after.misses - before.misses
        # An nbd-overlay that was started again counts from 0.
        if before.misses >= 0 and requests > 0 and after.waited >= before.waited:
            found.append(Waits(after.time, requests, (after.waited - before.waited) / requests))
    return found
