"""``python -m tests.bench.channel``: measure the channel, and what there is without it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.channel import page
from tests.bench.channel.page import ROWS, Row
from tests.bench.channel.sample import Sample, measured
from tests.bench.channel.ways import IDLE, Case, ssh_cat
from tests.bench.machine import describe_machine
from tests.bench.measure import turns
from tests.bench.table import written_by_hand

_ALONE = "BENCH_CHANNEL_ALONE"
"""Is in the environment of who has a network of his own, in which no other one finds its servers."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.channel", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender is measured (3)")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each of its two measurements (1.5)")
    names = [each.name for each in ROWS]
    parser.add_argument("--row", action="append", choices=names, help="; may be repeated (all)")
    parser.add_argument("--output", type=Path, help="write the page to this file as well")
    return parser.parse_args(words)


def main() -> None:
    """Run the benchmark."""
    chosen = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if os.geteuid() == 0 and _ALONE not in os.environ:
        own = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"')
        words = (*own, sys.executable, "-m", "tests.bench.channel", *sys.argv[1:])
        os.execvpe(words[0], words, {**os.environ, _ALONE: "1"})
    rows = [each for each in ROWS if not chosen.row or each.name in chosen.row]
    described = describe_machine(Path(__file__))
    machine = {what: described[what] for what in ("date", "processors", "kernel", "Python")}
    machine["load average before it began"] = f"{os.getloadavg()[0]:.1f}"
    found = {row.name: gathered(row, chosen.rounds, chosen.seconds) for row in rows}
    text = "\n".join([page.introduction(machine), *(page.section(row, found) for row in rows)])
    print(text)
    if chosen.output:
        chosen.output.write_text(f"{text}\n{written_by_hand(chosen.output)}")


def gathered(row: Row, rounds: int, seconds: float) -> dict[tuple[str, Case], list[Sample]]:
    """Measure a row, contenders in turn."""
    contenders = list(row.contenders.items())
    samples: dict[tuple[str, Case], list[Sample]] = {}
    for order in turns(len(contenders), rounds):
        for case in row.cases:
            for name, start in (contenders[number] for number in order):
                if start is ssh_cat and case is IDLE:
                    continue
                sample = measured(start, case, seconds)
                samples.setdefault((name, case), []).append(sample)
                told = f"{sample.ram / 1e6:.0f} + {sample.disk / 1e6:.0f} MB/s, p99 {sample.p99 * 1e3:.2f} ms"
                print(f"{row.name}, {case.name}, {name}: {told}", file=sys.stderr, flush=True)
    return samples


if __name__ == "__main__":
    main()
