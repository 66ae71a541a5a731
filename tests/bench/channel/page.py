"""The rows, what was wanted of each, and the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.channel.sample import Sample, median
from tests.bench.channel.ways import BOTH, DISK, IDLE, RAM, SIZE, Case, Start, Wire, apart, channel, ssh_cat
from tests.bench.table import table

GIGABIT = 125e6
"""Bytes per second."""
CHANNEL = "channel"
LEAST, LEAST_FAR, MOST = 0.8, 0.7, 2.0
"""Parts of the others' rate, and of the one without a round trip; times the latency without load."""

INTRODUCTION = f"""\
# Benchmarks of the single channel

Written by `.venv/bin/python -m tests.bench.channel --output docs/benchmarks-channel.md`;
`make bench-channel` prints the same. `--rounds 3` is how often each is measured, `--row NAME` measures a row
alone. RAM are zeros from a process in QEMU's place to another, as fast as they go; the disk
({SIZE >> 20} MiB, in memory) is read by libnbd, 16 requests of 256 KiB under way. Both ends, and what stands
for the QEMUs, share the processors of one machine, and its loopback. Contenders take turns; figures are
medians of the rounds.

| figure | what it is |
| --- | --- |
| RAM, disk, together | MB a second |
| read | of 4 KiB, one at a time, by a client of its own beside that load: ms, median / 99 % |
| source, destination | seconds of a processor per GB at each end, with what stands for QEMU, and the client |

`two connections` are what QEMU has without a channel: its stream in one, nbdserve and libnbd in another.
`ssh cat` is one stream of as many bytes. The wire of 1 Gbit/s, and the long one, are
[a proxy](../tests/bench/channel/wire.py) that all connections share.
"""


@dataclass(frozen=True)
class Row:
    """Contenders side by side, in these cases."""

    name: str
    contenders: Mapping[str, Start]
    cases: Sequence[Case]


TWO = "two connections"
CAT = "ssh cat"
SHORT, LONG = "1 Gbit/s", "1 Gbit/s, 100 ms"
ROWS = (
    Row("TCP", {TWO: apart(), CHANNEL: channel("tcp")}, (BOTH, RAM, DISK, IDLE)),
    Row("TLS", {TWO: apart(tls=True), CHANNEL: channel("tls")}, (BOTH, RAM, DISK, IDLE)),
    Row("ssh", {CAT: ssh_cat, CHANNEL: channel("ssh")}, (BOTH, RAM, IDLE)),
    Row(
        SHORT,
        {TWO: apart(wire=Wire(GIGABIT, 0)), CHANNEL: channel("tcp", Wire(GIGABIT, 0))},
        (BOTH, RAM, IDLE),
    ),
    Row(
        LONG,
        {TWO: apart(wire=Wire(GIGABIT, 0.1)), CHANNEL: channel("tcp", Wire(GIGABIT, 0.1))},
        (BOTH, RAM, IDLE),
    ),
)
"""What goes over the long wire is held against what goes over the short one too."""

Found = Mapping[tuple[str, Case], Sequence[Sample]]
"""By contender and case, of a row."""


@dataclass(frozen=True)
class Verdict:
    """A bound, and what was measured."""

    what: str
    bound: str
    measured: float
    kept: bool


def introduction(machine: Mapping[str, str]) -> str:
    """The start of the page."""
    return "\n".join([INTRODUCTION, *(f"- {what}: {value}" for what, value in machine.items())])


def section(row: Row, found: Mapping[str, Found]) -> str:
    """A row; all that were measured are known by name."""
    heads = [
        "what moves",
        "contender",
        "RAM",
        "disk",
        "together",
        "read ms",
        "source s/GB",
        "destination s/GB",
    ]
    lines = [
        [case.name, name, *figures(found[row.name][name, case])]
        for case in row.cases
        for name in row.contenders
        if found[row.name].get((name, case))
    ]
    judged = [
        [each.what, each.bound, f"{each.measured:.2f}", "met" if each.kept else "MISSED"]
        for each in verdicts(row, found)
    ]
    return "\n".join(
        [f"\n## {row.name}\n", table(heads, lines), "", table(["wanted", "", "measured", ""], judged)]
    )


def figures(samples: Sequence[Sample]) -> Iterator[str]:
    """The figures of a contender in a case."""
    for rate in (lambda each: each.ram, lambda each: each.disk, lambda each: each.rate):
        yield f"{median(samples, rate) / 1e6:.0f}"
    middle, late = (1000 * median(samples, each) for each in (lambda each: each.p50, lambda each: each.p99))
    yield f"{middle:.2f} / {late:.2f}" if late else "-"
    moved = median(samples, lambda each: each.rate) > 0
    for cost in (lambda each: each.source, lambda each: each.destination):
        yield f"{median(samples, cost) * 1e9:.2f}" if moved else "-"


def verdicts(row: Row, found: Mapping[str, Found]) -> Iterator[Verdict]:
    """What was wanted of the channel in a row."""
    here = found[row.name]
    other = next(iter(row.contenders))

    def rate(name: str, where: Found) -> float:
        return median(where[name, BOTH], lambda each: each.rate)

    least = rate(CHANNEL, here) / rate(other, here)
    yield Verdict(f"RAM and disk together, of {other}", f"≥ {LEAST}", least, least >= LEAST)
    if row.name == LONG and SHORT in found:
        far = rate(CHANNEL, here) / rate(CHANNEL, found[SHORT])
        yield Verdict(
            "the same, of the channel's own without a round trip", f"≥ {LEAST_FAR}", far, far >= LEAST_FAR
        )
    for name in row.contenders:
        if row.contenders[name] is not ssh_cat:
            loaded, idle = (median(here[name, case], lambda each: each.p99) for case in (RAM, IDLE))
            times = loaded / idle
            what = f"{name}: a read's 99 % under full RAM load, of that without"
            yield Verdict(what, f"≤ {MOST:g}", times, times <= MOST)
