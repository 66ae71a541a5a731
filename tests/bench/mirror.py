"""``python -m tests.bench.mirror``: what a mirror costs the guest's writes.

fio writes to an overlay with a mirror and to one without, in interleaved rounds. The host of the guest is one
processor, that of the mirror another, so that what the receiver computes is not the guest's cost.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.machine import describe_machine
from tests.bench.overlay import Bench, fio, write_random
from tests.bench.table import written_by_hand
from tests.support import servers
from tests.support.disks import MIB
from tests.support.mirrors import receiver, wait_until_followed
from tests.support.overlays import Daemon, make_overlay, overlay
from tests.support.servers import fresh_path

INTRODUCTION = """\
# Benchmarks of the mirror

Written by `.venv/bin/python -m tests.bench.mirror --output docs/benchmarks-mirror.md`. fio writes to an
overlay with `--mirror-writes` and to one without, in interleaved rounds, to blocks that it has written
before; figures are medians. fio and nbd-overlay share one processor, as the guest's host; the receiver has
the other one. Images are in memory, so that no disk hides the cost. After each round the mirror must follow
before the next one begins.
"""

MOST = 1.2
"""How much longer a guest's writes may take with a mirror."""


@dataclass(frozen=True)
class Access:
    """How a guest writes."""

    name: str
    options: Sequence[str]
    depth: int


ACCESSES = (
    Access("4 KiB at random, depth 16, a flush after 32", ("--bs=4096", "--fsync=32"), 16),
    Access("4 KiB at random, depth 16, no flush", ("--bs=4096",), 16),
    Access("4 KiB at random, depth 1, a flush after each", ("--bs=4096", "--fsync=1"), 1),
    Access("64 KiB at random, depth 4, a flush after 32", ("--bs=65536", "--fsync=32"), 4),
    Access(
        "20 MiB/s of 16 KiB at random, depth 4, a flush after 32",
        ("--bs=16384", "--fsync=32", "--rate=20m"),
        4,
    ),
)


@contextmanager
def guests_host() -> Iterator[None]:
    """What is started within is on the first processor of two."""
    both = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(both)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, both)


@contextmanager
def other_host() -> Iterator[None]:
    """What is started within is on the last one."""
    both = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(both)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, both)


def measure(bench: Bench, access: Access, seconds: float) -> None:
    """One way to write, with a mirror and without."""
    directory = bench.directory
    samples: dict[str, list[float]] = {"without": [], "with a mirror": []}
    late: dict[str, list[float]] = {name: [] for name in samples}
    options = ("--time_based", f"--runtime={round(1000 * seconds)}ms", "--norandommap", *access.options)
    with ExitStack() as stack:
        with other_host():
            source = stack.enter_context(
                servers.nbdserve("-r", "--format=raw", bench.source, directory=directory)
            )
            mirror = make_overlay(fresh_path(directory, "mirror", ".img"), "flat", bench.size, source.uri())
            at = stack.enter_context(receiver(mirror, fresh_path(directory, "mirror", ".sock"), directory))
        with guests_host():
            daemons: dict[str, Daemon] = {}
            for name, more in zip(samples, ((), ("--mirror-writes", at.uri())), strict=True):
                image = make_overlay(fresh_path(directory, "guest", ".img"), "flat", bench.size, source.uri())
                daemons[name] = stack.enter_context(overlay(image, *more, directory=directory))
                fio(daemons[name].address, "write", 8, bench.size, "--bs=1M")
            for _ in range(bench.rounds):
                for name, daemon in daemons.items():
                    run = fio(daemon.address, "randwrite", access.depth, bench.size, *options)
                    samples[name].append(run.rate)
                    late[name].append(run.p99 * 1000)
                    if name != "without":
                        wait_until_followed(daemon)
    rates = bench.figures(access.name, "writes/s", samples)
    tails = {name: statistics.median(values) for name, values in late.items()}
    bench.say(f"99 % within {tails['without']:.2f} ms without, {tails['with a mirror']:.2f} ms with it.\n")
    bench.limit("time of a write, with / without", rates["without"] / rates["with a mirror"], MOST)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.mirror", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=256, help="the disk's size in MiB (256)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (2)")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--output", type=Path, help="write the page to this file as well")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.directory) as scratch:
        bench = Bench(Path(scratch), chosen.rounds, chosen.size * MIB, Path(scratch) / "source.img")
        write_random(bench.source, bench.size)
        bench.say(INTRODUCTION)
        for what, value in describe_machine(bench.source).items():
            bench.say(f"- {what}: {value}")
        for access in ACCESSES:
            measure(bench, access, chosen.seconds)
    bench.say(f"\nRounds: {chosen.rounds}.")
    if chosen.output:
        chosen.output.write_text("\n".join([*bench.lines, ""]) + written_by_hand(chosen.output))


if __name__ == "__main__":
    main()
