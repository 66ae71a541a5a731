"""The page: how it was measured, and a section for each link and file system."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.migrate.bounds import Samples, verdicts
from tests.bench.migrate.capacity import Capacity
from tests.bench.migrate.contenders import Contender
from tests.bench.migrate.hosts import Link
from tests.bench.migrate.sample import KINDS, Phase, Sample, median
from tests.bench.migrate.workload import HOT, READ, WRITTEN
from tests.bench.table import table

KIB, MIB = 1 << 10, 1 << 20

INTRODUCTION = """\
# Benchmarks of a migration

Written by `.venv/bin/python -m tests.bench.migrate --output docs/benchmarks-migrate.md`; `make bench-migrate`
prints the same. `SIZE=4G` is the disk's, `ROUNDS=3` how often each contender moves the guest, and
`DIRECTORIES="/dev/shm /var/tmp"` where disks lie; it needs root, for network namespaces. In one run every
contender moves the same guest with the same disk and the same load, in interleaved rounds; figures are
medians.

The guest is a Linux under TCG, so that no KVM is needed, in which
[a program](../tests/bench/migrate/workload.py) writes and reads past its cache at a steady pace, and tells
of each request. *Latencies* are by the guest's clock, which stands still while the guest does; so the *gap*
is by the host's: from the last answer that the guest had on A to the first on B. A request that is late
delays the next one, so those that would have come meanwhile are not counted.

| figure | from | to |
| --- | --- | --- |
| cut-over | the operator's command | the guest's first answer on B |
| downtime | the guest stands still on A | as A's QEMU tells |
| window | cut-over | nothing on A is needed: every block is in B's file, which is synced. A mirror has none |
| total | the operator's command | A's QEMU and the servers have ended |
| bytes | over the link in both directions, disk and RAM | |

The links are [a proxy](../tests/bench/migrate/link.py) through which all connections of every contender go,
disk and RAM; what it carries by itself is told below. The cable is a pair of virtual network devices, without
a limit and without a proxy. Where a round trip is long a part of the disk is moved, as
QEMU's streaming asks for little at a time and would take an hour: the size stands in the heading.
"""


@dataclass(frozen=True)
class Part:
    """What was measured on a link, with disks of ``size`` bytes in one directory."""

    link: Link
    filesystem: str
    size: int
    capacity: Capacity
    samples: Samples
    failures: Sequence[str] = ()


def introduction(machine: Mapping[str, str], contenders: Sequence[Contender], missing: Iterable[str]) -> str:
    """The start of the page."""
    lines = [[each.name, each.remark] for each in contenders]
    return "\n".join(
        [
            INTRODUCTION,
            *(f"- {what}: {value}" for what, value in machine.items()),
            "",
            table(["contender", "what it is"], lines),
            "",
            *missing,
        ]
    )


def load(rate: float, size: int) -> str:
    """What the guest does, in a line."""
    return (
        f"{rate:g} writes of {WRITTEN // KIB} KiB and {rate:g} reads of {READ // KIB} KiB a second; writes "
        f"in the first 1/{HOT} of a disk of {size // MIB} MiB, reads anywhere"
    )


def section(part: Part) -> str:
    """One link and file system."""
    carried = f"The link alone carries {part.capacity.rate / MIB:.0f} MiB/s"
    if part.link.rate is not None:
        carried += f", for which the proxy needs {part.capacity.processor:.0%} of a processor"
    carried += f": the disk alone takes {part.size / part.capacity.rate:.2f} s on it"
    return "\n".join(
        [
            f"\n## {title(part)}\n",
            f"{carried}.\n",
            table(
                [
                    "contender",
                    "cut-over s",
                    "downtime ms",
                    "gap ms",
                    "window s",
                    "total s",
                    "bytes / disk",
                    "rounds",
                ],
                [[name, *figures(samples, part.size)] for name, samples in part.samples.items()],
            ),
            "",
            "The guest's latencies in ms, median / 99 % / longest (of all rounds):\n",
            table(
                ["contender", *(f"{kind}, {phase.value}" for kind in KINDS.values() for phase in Phase)],
                [[name, *latencies(samples)] for name, samples in part.samples.items()],
            ),
            "",
            *bounds(part),
            *(f"{failure}\n" for failure in part.failures),
        ]
    )


def title(part: Part) -> str:
    """What was measured, in a few words."""
    where = f"{part.size // MIB} MiB on {part.filesystem}"
    if part.link.rate is None:
        return f"{part.link.name} without a limit, {where}"
    return f"{part.link.rate * 8 / 1e9:g} Gbit/s, {1000 * part.link.trip:g} ms of round trip, {where}"


def figures(samples: Sequence[Sample], size: int) -> list[str]:
    """The figures of a contender."""
    if not samples:
        return [*["-"] * 6, "0"]
    return [
        f"{median(samples, lambda each: each.cut_over):.2f}",
        f"{1000 * median(samples, lambda each: each.downtime):.0f}",
        f"{1000 * median(samples, lambda each: each.gap):.0f}",
        f"{median(samples, lambda each: each.window):.2f}",
        f"{median(samples, lambda each: each.total):.2f}",
        f"{median(samples, lambda each: each.passed) / size:.3f}",
        str(len(samples)),
    ]


def latencies(samples: Sequence[Sample]) -> Iterator[str]:
    """Its latencies."""
    if not samples:
        yield from ["-"] * len(KINDS) * len(Phase)
        return
    for kind in KINDS:
        for phase in Phase:
            found = [each.latencies[phase, kind] for each in samples]
            middle = statistics.median(each.median for each in found)
            late = statistics.median(each.p99 for each in found)
            longest = max(each.longest for each in found)
            yield f"{1000 * middle:.1f} / {1000 * late:.1f} / {1000 * longest:.0f}"


def bounds(part: Part) -> list[str]:
    """What was wanted beside what was measured."""
    lines = [
        [each.what, f"{each.most:.3g}", f"{each.measured:.3g}", "met" if each.kept else "MISSED"]
        for each in verdicts(part.link, part.filesystem, part.size, part.samples)
    ]
    return [table(["wanted", "at most", "measured", ""], lines), ""] if lines else []
