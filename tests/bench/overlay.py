"""``python -m tests.bench.overlay``: how fast an overlay fills and serves, beside QEMU's own.

In one run, in interleaved rounds, every contender gets the same source: nbdserve on a disk of random data in
memory, reached through a link that adds nothing, or 20 ms. Figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.bench.fillers import FLAT, QED, QEMU_QCOW2, QEMU_QED, Contender, nbdcopy, touch_memory
from tests.bench.machine import describe_machine
from tests.bench.table import written_by_hand
from tests.support import servers
from tests.support.delay import delayed
from tests.support.disks import MIB
from tests.support.processes import check
from tests.support.servers import UnixAddress

FAR = 0.02
"""Seconds of round trip that the long link adds."""


INTRODUCTION = """\
# Benchmarks of the overlay

Written by `.venv/bin/python -m tests.bench.overlay --output docs/benchmarks-overlay.md`, which `make bench`
runs too. In one run every contender gets the same source, nbdserve on a disk of random data in memory, in
interleaved rounds; figures are medians. QEMU is its storage daemon: `block-stream` into an image with
`copy-on-read` on top. The long link is a proxy in Python that passes answers on 20 ms later; it takes a good
part of the processors.
"""

SPARSE = 1 << 40
"""Disks from this size on are nearly empty."""


@dataclass
class Bench:
    """What a run was asked for, and where it works."""

    directory: Path
    rounds: int
    size: int
    source: Path
    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        """A line of the page, shown at once."""
        print(line, flush=True)
        self.lines.append(line)

    def figures(self, name: str, unit: str, samples: Mapping[str, list[float]]) -> dict[str, float]:
        """A table of medians with the lowest and highest; returns the medians."""
        self.say(f"\n## {name}\n")
        self.say(f"| contender | {unit} | lowest..highest |\n| --- | --- | --- |")
        for contender, values in samples.items():
            spread = f"{min(values):.4g}..{max(values):.4g}"
            self.say(f"| {contender} | {statistics.median(values):.4g} | {spread} |")
        self.say("")
        return {contender: statistics.median(values) for contender, values in samples.items()}

    def target(self, what: str, value: float, least: float) -> None:
        """Say whether a target is met."""
        self.say(f"Target {what} ≥ {least:g}: {'met' if value >= least else 'MISSED'} ({value:.2f}).")

    def limit(self, what: str, value: float, most: float) -> None:
        """Say whether a limit is kept."""
        self.say(f"Limit {what} ≤ {most:g}: {'kept' if value <= most else 'MISSED'} ({value:.4g}).")


@contextmanager
def source(
    bench: Bench, seconds: float, image: Path | None = None, count: Path | None = None
) -> Iterator[UnixAddress]:
    """nbdserve on the source's disk behind a link of so many seconds."""
    with servers.nbdserve("-r", "--format=raw", image or bench.source, directory=bench.directory) as server:
        assert isinstance(server.address, UnixAddress)
        with delayed(server.address, seconds, bench.directory, count) as near:
            yield near


def fill(bench: Bench, contender: Contender, at: UnixAddress) -> float:
    """MiB a second at which it fills."""
    if bench.size < SPARSE:
        touch_memory(bench.directory, bench.size)
    with contender.start(at, bench.size, bench.directory) as filler:
        return bench.size / MIB / filler.fill()


def streaming(bench: Bench) -> None:
    """Filling from the same machine, without any link between."""
    contenders = [FLAT, QED, QEMU_QED, QEMU_QCOW2]
    samples: dict[str, list[float]] = {each.name: [] for each in contenders}
    samples["nbdcopy"] = []
    with servers.nbdserve("-r", "--format=raw", bench.source, directory=bench.directory) as server:
        assert isinstance(server.address, UnixAddress)
        for _ in range(bench.rounds):
            for each in contenders:
                samples[each.name].append(fill(bench, each, server.address))
            touch_memory(bench.directory, bench.size)
            samples["nbdcopy"].append(bench.size / MIB / nbdcopy(server.address, bench.directory))
    rates = bench.figures("Streaming, same machine", "MiB/s", samples)
    bench.target("flat / QEMU into QED", rates[FLAT.name] / rates[QEMU_QED.name], 3.0)
    bench.target("qed / QEMU into QED", rates[QED.name] / rates[QEMU_QED.name], 3.0)
    bench.target("flat / QEMU into qcow2", rates[FLAT.name] / rates[QEMU_QCOW2.name], 2.0)
    bench.target("flat / nbdcopy", rates[FLAT.name] / rates["nbdcopy"], 1.0)


def far(bench: Bench) -> None:
    """Filling over a link with 20 ms of round trip, and over the same link without."""
    small = Bench(bench.directory, 1, 64 * MIB, bench.directory / "small.img")
    write_random(small.source, small.size)
    samples: dict[str, list[float]] = {"flat, 20 ms": [], "flat, 0 ms": [], "QEMU, qed, 20 ms": []}
    with source(bench, FAR) as long, source(bench, 0.0) as short, source(small, FAR) as for_qemu:
        for _ in range(bench.rounds):
            samples["flat, 20 ms"].append(fill(bench, FLAT, long))
            samples["flat, 0 ms"].append(fill(bench, FLAT, short))
            # QEMU would take minutes for all of it.
            samples["QEMU, qed, 20 ms"].append(fill(small, QEMU_QED, for_qemu))
    rates = bench.figures("Streaming over a link with 20 ms of round trip", "MiB/s", samples)
    bench.target("flat / QEMU into QED", rates["flat, 20 ms"] / rates["QEMU, qed, 20 ms"], 20.0)
    bench.target("20 ms / 0 ms", rates["flat, 20 ms"] / rates["flat, 0 ms"], 0.7)


def sparse(bench: Bench) -> None:
    """Bytes over the network for a disk of which half is allocated, in pieces of 64 KiB."""
    disk, count = bench.directory / "half.img", bench.directory / "half.count"
    piece = 64 << 10
    with disk.open("wb") as file:
        file.truncate(256 * MIB)
        for offset in range(0, 256 * MIB, 2 * piece):
            file.seek(offset)
            file.write(os.urandom(piece))
    half = Bench(bench.directory, 1, 256 * MIB, disk)
    with source(half, 0.0, count=count) as at:
        fill(half, FLAT, at)
    ratio = int(count.read_text()) / (128 * MIB)
    bench.say("\n## A half-empty disk\n")
    bench.limit("bytes over the network / allocated bytes", ratio, 1.01)
    disk.unlink()


@dataclass(frozen=True)
class Fio:
    """What one run of fio reported."""

    rate: float
    """Operations a second."""
    p99: float
    """Seconds within which 99 % of the requests were answered."""


def fio(at: UnixAddress, access: str, depth: int, size: int, *options: str) -> Fio:
    """4 KiB requests all over the first ``size`` bytes, each block once."""
    output = check(
        "fio", "--name=guest", "--ioengine=nbd", f"--uri={at.uri()}", f"--rw={access}", "--bs=4096",
        f"--iodepth={depth}", f"--size={size}", "--output-format=json", *options, seconds=120,
    )  # fmt: skip
    job = json.loads(output[output.index("{") :])["jobs"][0]
    part = job["write" if "write" in access else "read"]
    return Fio(part["iops"], part["clat_ns"]["percentile"]["99.000000"] / 1e9)


def latency(bench: Bench) -> None:
    """A guest's reads of what is missing, while streaming goes on at full speed."""
    samples: dict[str, list[float]] = {FLAT.name: [], QEMU_QED.name: []}
    with servers.nbdserve("-r", "--format=raw", bench.source, directory=bench.directory) as server:
        assert isinstance(server.address, UnixAddress)
        for _ in range(bench.rounds):
            for contender in (FLAT, QEMU_QED):
                with contender.start(server.address, bench.size, bench.directory) as filler:
                    filler.start()
                    run = fio(filler.address, "randread", 1, bench.size, "--runtime=700ms")
                    samples[contender.name].append(run.p99 * 1000)
    found = bench.figures("4 KiB random reads while streaming, p99", "ms", samples)
    bench.limit("flat / QEMU", found[FLAT.name] / found[QEMU_QED.name], 1 / 3)


def local_reads(bench: Bench) -> None:
    """Reads of what is local, depth 16, against qemu-nbd on a raw file."""
    samples: dict[str, list[float]] = {"flat, half full": [], "flat, complete": [], "qemu-nbd, raw": []}
    options = ("--time_based", "--runtime=600ms", "--norandommap")
    half = bench.size // 2
    with ExitStack() as stack:
        at = stack.enter_context(source(bench, 0.0))
        partial = stack.enter_context(FLAT.start(at, bench.size, bench.directory))
        fio(partial.address, "read", 16, half, "--bs=1M")
        full = stack.enter_context(FLAT.start(at, bench.size, bench.directory))
        full.fill()
        peer = stack.enter_context(
            servers.qemu_nbd("--format=raw", "--cache=writeback", bench.source, directory=bench.directory)
        )
        assert isinstance(peer.address, UnixAddress)
        for _ in range(max(5, bench.rounds)):
            for name, address in zip(samples, (partial.address, full.address, peer.address), strict=True):
                samples[name].append(fio(address, "randread", 16, half, *options).rate / 1000)
    found = bench.figures("4 KiB random reads of local blocks, depth 16", "thousand/s", samples)
    bench.target("flat, half full / qemu-nbd", found["flat, half full"] / found["qemu-nbd, raw"], 2.0)
    bench.target("flat, complete / qemu-nbd", found["flat, complete"] / found["qemu-nbd, raw"], 2.0)


def writes(bench: Bench) -> None:
    """Random writes to absent blocks against writes to present ones, depth 16."""
    samples: dict[str, list[float]] = {"absent": [], "present": []}
    region = 96 * MIB
    with source(bench, 0.0) as at, FLAT.start(at, bench.size, bench.directory) as filler:
        for number in range(min(bench.rounds * 3, bench.size // region)):
            for name in samples:
                run = fio(filler.address, "randwrite", 16, region, f"--offset={number * region}")
                samples[name].append(run.rate / 1000)
    found = bench.figures("4 KiB random writes, depth 16, flat", "thousand/s", samples)
    bench.target("absent / present", found["absent"] / found["present"], 0.8)


def huge(bench: Bench) -> None:
    """Starting on sparse disks, and the memory that it takes to fill them."""
    bench.say("\n## Sparse disks\n")
    for terabytes, most in ((16, 150), (1, 64)):
        disk = bench.directory / "sparse.img"
        with disk.open("wb") as file:
            file.truncate(terabytes << 40)
        large = Bench(bench.directory, 1, terabytes << 40, disk)
        with source(large, 0.0) as at:
            began = time.monotonic()
            with FLAT.start(at, large.size, bench.directory) as filler:
                process = psutil.Process(filler.process.pid)
                started = time.monotonic() - began
                fio(filler.address, "randread", 16, large.size, "--number_ios=2000")
                fio(filler.address, "randwrite", 16, large.size, "--number_ios=2000", "--norandommap")
                took = filler.fill()
                memory = process.memory_info().rss / MIB
        bench.say(f"{terabytes} TiB: created and started in {started:.2f} s, filled (zeros) in {took:.1f} s.")
        bench.limit(
            f"MiB of memory at {terabytes} TiB, after 4,000 random accesses and filling", memory, most
        )
        disk.unlink()


PARTS: dict[str, Callable[[Bench], None]] = {
    "streaming": streaming,
    "far": far,
    "sparse": sparse,
    "latency": latency,
    "local-reads": local_reads,
    "writes": writes,
    "huge": huge,
}


def write_random(path: Path, size: int) -> None:
    """Random data, which then lies in the page cache."""
    with path.open("wb") as image:
        for _ in range(size // MIB):
            image.write(os.urandom(MIB))


def arguments(parts: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overlay", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender is measured (3)")
    parser.add_argument("--size", type=int, default=2048, help="the disk's size in MiB (2048)")
    parser.add_argument(
        "--directory", type=Path, default=Path("/dev/shm"), help="where the images lie (in memory)"
    )
    parser.add_argument("--part", action="append", choices=parts, help="only this part; may be repeated")
    parser.add_argument("--output", type=Path, help="write the page to this file as well")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    chosen = arguments(list(PARTS))
    with tempfile.TemporaryDirectory(dir=chosen.directory) as scratch:
        bench = Bench(Path(scratch), chosen.rounds, chosen.size * MIB, Path(scratch) / "source.img")
        write_random(bench.source, bench.size)
        bench.say(INTRODUCTION)
        for what, value in describe_machine(bench.source).items():
            bench.say(f"- {what}: {value}")
        before = os.getloadavg()[0]
        for name in chosen.part or PARTS:
            PARTS[name](bench)
    bench.say(
        f"\nRounds: {chosen.rounds}. Load average before and after: {before:.1f}, {os.getloadavg()[0]:.1f}."
    )
    if chosen.output:
        chosen.output.write_text("\n".join([*bench.lines, ""]) + written_by_hand(chosen.output))


if __name__ == "__main__":
    main()
