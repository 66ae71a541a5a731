"""Runs the rows in interleaved rounds, so that what disturbs the machine disturbs every contender alike."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.contenders import Contender, Task
from tests.bench.counting import run_counting
from tests.bench.fio import run_fio
from tests.bench.rows import Row, Unit
from tests.bench.trust import Trust
from tests.support.servers import Server, UnixAddress, free_tcp_address, fresh_path

# From this share of one processor on, a single-threaded program is taken to be what limits the rate.
BUSY = 0.9


@dataclass(frozen=True)
class Sample:
    """One run of one row against one contender."""

    rate: float
    """In the row's unit."""
    server_processors: float
    """How many processors the server kept busy."""
    client_processor: float
    """How busy the client's busiest connection was, as a share of one processor."""
    server_seconds: float
    """Processor time of the server."""
    client_seconds: float
    """Processor time of the client."""
    server_cost: float
    """Processor time of the server: microseconds per operation, or milliseconds per MiB."""


@dataclass(frozen=True)
class Result:
    """All runs of one row against one contender."""

    row: Row
    contender: Contender
    samples: Sequence[Sample]

    @property
    def rates(self) -> list[float]:
        """The rate of each run."""
        return [sample.rate for sample in self.samples]

    @property
    def rate(self) -> float:
        """The median rate."""
        return statistics.median(self.rates)

    @property
    def lowest(self) -> float:
        """The lowest rate of a run."""
        return min(self.rates)

    @property
    def highest(self) -> float:
        """The highest rate of a run."""
        return max(self.rates)

    def median(self, figure: Callable[[Sample], float]) -> float:
        """The median of some figure of the runs."""
        return statistics.median(map(figure, self.samples))

    @property
    def is_limited_by_client(self) -> bool:
        """Whether the client had no processor time left, so that the server may be faster than measured."""
        return self.median(lambda sample: sample.client_processor) >= BUSY


def measure(
    row: Row,
    contenders: Sequence[Contender],
    image: Path,
    directory: Path,
    trust: Trust,
    rounds: int,
    seconds: float,
) -> list[Result]:
    """Start the contenders on the image, and measure each once per round, in turn: see :func:`turns`."""
    client = trust.client() if row.tls else []
    with contextlib.ExitStack() as stack:
        running = [
            (contender, stack.enter_context(_start(contender, row, image, directory, trust)))
            for contender in contenders
        ]
        samples: list[list[Sample]] = [[] for _ in running]
        for order in turns(len(running), rounds):
            for each in order:
                contender, server = running[each]
                samples[each].append(_sample(row, contender, server, seconds, client))
    return [
        Result(row, contender, of_contender)
        for contender, of_contender in zip(contenders, samples, strict=True)
    ]


def turns(contenders: int, rounds: int) -> Iterator[Sequence[int]]:
    """In which order contenders are measured, in each round: backwards in every other, as place matters."""
    forwards = range(contenders)
    for number in range(rounds):
        yield forwards[::-1] if number % 2 else forwards


def _start(
    contender: Contender, row: Row, image: Path, directory: Path, trust: Trust
) -> contextlib.AbstractContextManager[Server]:
    address = free_tcp_address() if row.tcp else UnixAddress(fresh_path(directory, "bench", ".sock"))
    identity = trust.identity if row.tls else None
    return contender.start(Task(image, row.writes, directory, address, identity))


def _sample(row: Row, contender: Contender, server: Server, seconds: float, client: Sequence[str]) -> Sample:
    before = _processor_seconds(server.pid)
    if row.counting:
        run = run_counting(server.address, contender.export, row, seconds)
    else:
        uri = server.uri(contender.export)
        run = run_fio(uri.replace("nbd://", "nbds://") if row.tls else uri, row, seconds, client)
    spent = _processor_seconds(server.pid) - before
    if row.unit is Unit.OPERATIONS:
        rate, cost = run.operations / run.seconds / 1000, spent / run.operations * 1e6
    else:
        mebibytes = run.bytes / (1 << 20)
        rate, cost = mebibytes / run.seconds, spent / mebibytes * 1e3
    return Sample(rate, spent / run.seconds, run.processor, spent, run.processor_seconds, cost)


def _processor_seconds(pid: int) -> float:
    """User and system time of a process and its descendants, also of those that have ended."""
    total = 0.0
    process = psutil.Process(pid)
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
