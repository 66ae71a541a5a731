"""What clients have asked for and how long it took, counted so that it costs the transmission loop nothing.

Each client has a Traffic of its own, in which its own thread counts with plain integers; whoever wants totals
adds them up. What workers find out, errors and their latencies, is counted under a lock.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator

from nbdserve.protocol.constants import Command

COMMANDS = tuple(command for command in Command if command not in (Command.DISC, Command.RESIZE))
"""The commands that are counted."""

BUCKETS = (
    5e-5,
    1e-4,
    2.5e-4,
    5e-4,
    1e-3,
    2.5e-3,
    5e-3,
    1e-2,
    2.5e-2,
    5e-2,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
"""The upper bounds of the latency histogram in seconds, each inclusive; one more bucket has no bound."""

_SLOTS = max(Command) + 1


class Histogram:
    """How many requests took how long."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.seconds = 0.0

    def observe(self, seconds: float, requests: int = 1) -> None:
        """Count requests that took so long, each."""
        self.counts[bisect_left(BUCKETS, seconds)] += requests
        self.seconds += seconds * requests

    def add(self, other: Histogram) -> None:
        """Count all that the other one has counted."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.seconds += other.seconds


class Traffic:
    """The requests of one client, or of many, by command: lists with a slot for each Command.

    ``requests`` and ``bytes``, the bytes that requests which could be served were about, are counted by the
    thread of the connection. ``timed`` asks for latencies too.
    """

    def __init__(self, *, timed: bool = False) -> None:
        self.requests = [0] * _SLOTS
        self.bytes = [0] * _SLOTS
        self.errors = [0] * _SLOTS
        self.timed = timed
        self._latencies: dict[int, Histogram] = {}
        self._lock = threading.Lock()

    def failed(self, command: int) -> None:
        """Count an error reply; a command that is not known here is not counted. From any thread."""
        if command < _SLOTS:
            with self._lock:
                self.errors[command] += 1

    def took(self, command: int, seconds: float, requests: int = 1) -> None:
        """Count the latency of requests, each the same; not of unknown commands. From any thread."""
        if command < _SLOTS:
            with self._lock:
                self._histogram(command).observe(seconds, requests)

    def latencies(self) -> Iterator[tuple[Command, Histogram]]:
        """Yield the histograms of the commands that were used."""
        with self._lock:
            found = list(self._latencies.items())
        return ((Command(command), histogram) for command, histogram in found)

    def add(self, other: Traffic) -> None:
        """Count all that the other one has counted."""
        self.requests = [mine + theirs for mine, theirs in zip(self.requests, other.requests, strict=True)]
        self.bytes = [mine + theirs for mine, theirs in zip(self.bytes, other.bytes, strict=True)]
        self.errors = [mine + theirs for mine, theirs in zip(self.errors, other.errors, strict=True)]
        for command, histogram in other.latencies():
            self._histogram(command).add(histogram)

    def _histogram(self, command: int) -> Histogram:
        found = self._latencies.get(command)
        if found is None:
            found = self._latencies[command] = Histogram()
        return found
