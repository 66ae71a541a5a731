"""The rounds of chaos, several at a time, each with its line, and the sum of all."""

from __future__ import annotations

import argparse
import multiprocessing
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.chaos.judge import play
from tests.chaos.schedules import Kind, Schedule
from tests.chaos.settings import ANY, CHOICES


@dataclass(frozen=True)
class Line:
    """What is told of a round."""

    text: str
    failed: bool
    counts: Counter[Kind]


def play_round(number: int, seed: int, engine: str, wanted: dict[str, str]) -> Line:
    """Play one round in a directory of its own, which is kept, and named, when it has failed."""
    schedule = Schedule.draw(seed, number, engine, wanted)
    # Short, so that there is room in it for the sockets of ssh, by which its connections are found.
    directory = Path(tempfile.mkdtemp(prefix="nbd-", dir="/tmp"))
    head = f"{number:4}  {schedule.setting!s:<33}"
    try:
        played = play(directory, schedule)
    except AssertionError as error:
        return Line(f"{head} FAILED, see {directory}: {error}", True, Counter())
    shutil.rmtree(directory)
    struck = ", ".join(played.struck) or "nothing struck"
    return Line(f"{head} {struck}: {played.outcome}", False, played.counts)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("rounds", nargs="?", type=int, default=20)
    parser.add_argument("seed", nargs="?", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--engine", choices=(ANY, "overlay", "qemu"), default=ANY)
    parser.add_argument("--only", type=int, metavar="ROUND", help="play this round of the seed alone")
    parser.add_argument("--first", type=int, default=1, metavar="ROUND", help="begin with this round")
    parser.add_argument("--jobs", type=int, default=1, help="so many rounds at a time")
    for name, values in CHOICES.items():
        parser.add_argument(f"--{name}", choices=(ANY, *values), default=ANY)
    return parser.parse_args(arguments)


def lines(asked: argparse.Namespace, numbers: Sequence[int]) -> Iterator[Line]:
    """Play the rounds, in the order they end; several at a time in processes, as each has its environment."""
    wanted = {name: str(getattr(asked, name)) for name in CHOICES}
    fresh = multiprocessing.get_context("spawn")
    one = partial(play_round, seed=asked.seed, engine=asked.engine, wanted=wanted)
    if asked.jobs == 1:
        yield from map(one, numbers)
        return
    with fresh.Pool(asked.jobs, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(one, numbers)


def main(arguments: Sequence[str]) -> int:
    """Play the rounds, one line each; the exit code says whether all went as they must."""
    asked = parse(arguments)
    numbers = [asked.only] if asked.only else range(asked.first, asked.first + asked.rounds)
    given = {"engine": asked.engine, **{name: getattr(asked, name) for name in CHOICES}}
    what = ", ".join(f"{name} {value}" for name, value in given.items())
    print(f"chaos: rounds {numbers[0]} to {numbers[-1]}, seed {asked.seed}, {what}", flush=True)
    failures, counts = 0, Counter[Kind]()
    for line in lines(asked, numbers):
        print(line.text, flush=True)
        failures += line.failed
        counts += line.counts
    kinds = ", ".join(f"{count} {kind.value}" for kind, count in counts.most_common())
    print(f"chaos: {counts.total()} faults struck in the rounds that passed: {kinds}")
    print(f"chaos: {len(numbers) - failures} passed, {failures} failed")
    return 1 if failures else 0
