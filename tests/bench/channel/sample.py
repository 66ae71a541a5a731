"""What one measurement has shown, and what several of them say together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from nbdserve.client.libnbd import nbd
from tests.bench.channel.loads import Load
from tests.bench.channel.ways import Case, Start, ending
from tests.support.processes import wait_until

_BLOCK = 4096
"""Bytes of a demand read."""
_PAUSE = 0.001
"""Seconds between two of these."""
_SETTLE = 0.5
"""Seconds until it is measured."""
_BEGIN = 30.0
"""Seconds in which something must come."""


@dataclass(frozen=True)
class Sample:
    """Bytes a second of RAM and of the disk, then, under the same load, seconds of single reads.

    ``source`` and ``destination`` are what an end takes of a processor, in seconds per byte: with what
    stands for its QEMU, and the NBD client, without the single reads.
    """

    ram: float
    disk: float
    source: float
    destination: float
    latencies: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Of RAM and disk together."""
        return self.ram + self.disk

    @property
    def p99(self) -> float:
        """What one read of a hundred exceeds; 0 where there were none."""
        return sorted(self.latencies)[len(self.latencies) * 99 // 100] if self.latencies else 0.0

    @property
    def p50(self) -> float:
        """What is usual."""
        return statistics.median(self.latencies) if self.latencies else 0.0


def median(samples: Sequence[Sample], figure: Callable[[Sample], float]) -> float:
    """Return the median of a figure."""
    return statistics.median(map(figure, samples))


def measured(start: Start, case: Case, seconds: float) -> Sample:
    """Start a way, and measure for ``seconds``, and again for its latencies."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="channel-", dir="/dev/shm")))
        running = stack.enter_context(start(directory, case))
        loads = [running.ram] if case.ram else []
        behind = list(running.destination)
        if case.disk and running.disk:
            loads.append(stack.enter_context(ending(Load(directory, "read", running.disk))))
            behind.append(loads[-1].pid)
        for load in loads:
            wait_until(lambda each=load: each.moved > 0, "something comes", _BEGIN)  # type: ignore[misc]
        time.sleep(_SETTLE)
        counts, costs, began = (
            [each.moved for each in loads],
            (cost(running.source), cost(behind)),
            time.monotonic(),
        )
        time.sleep(seconds)
        passed = time.monotonic() - began
        came = [each.moved - count for each, count in zip(loads, counts, strict=True)]
        ram, disk = (sum(came[:1]), sum(came[1:])) if case.ram else (0, sum(came))
        each_byte = 1 / max(ram + disk, 1)
        source, destination = cost(running.source) - costs[0], cost(behind) - costs[1]
        waits = demand(running.disk, seconds) if running.disk else []
        return Sample(ram / passed, disk / passed, source * each_byte, destination * each_byte, tuple(waits))


def cost(pids: Sequence[int]) -> float:
    """Return how many seconds of a processor these processes, and their children, have had."""
    found = dict[int, float]()
    for pid in pids:
        this = psutil.Process(pid)
        for each in (this, *this.children(recursive=True)):
            found[each.pid] = sum(each.cpu_times()[:2])
    return sum(found.values())


def demand(uri: str, seconds: float) -> list[float]:
    """Read single blocks for so long, as for a guest that waits; the seconds of each."""
    handle, found, end = nbd.NBD(), list[float](), time.monotonic() + seconds
    handle.set_uri_allow_local_file(True)
    handle.connect_uri(uri)
    size = handle.get_size()
    while time.monotonic() < end:
        start = time.perf_counter()
        handle.pread(_BLOCK, len(found) * 7 * _BLOCK % size)
        found.append(time.perf_counter() - start)
        time.sleep(_PAUSE)
    handle.shutdown()
    return found
