"""``python -m tests.bench.quick``: this version beside another one, in five minutes.

The server's small and large requests and the overlay's stream, in interleaved rounds; each figure is the
median of the rounds' ratios, ours to theirs, with the interval in which it lies as far as so few rounds can
tell. A row whose whole interval is below ``--least`` is slower: the exit code is 1. Where only a part of it
is, more ``--rounds`` of that ``--row`` tell.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from tests.bench.__main__ import image_directory, write_image
from tests.bench.comparison import Comparison
from tests.bench.contenders import Contender, Task
from tests.bench.fillers import overlay, touch_memory
from tests.bench.measure import measure, turns
from tests.bench.rows import KIB4, MIB1, Row
from tests.bench.trust import Trust
from tests.bench.versions import HERE, Version, checked_out
from tests.support.disks import MIB
from tests.support.servers import Server, UnixAddress, fresh_path, nbdserve

ROWS = (
    Row("4 KiB random read, depth 1, Unix socket", "randread", KIB4, 1),
    Row("4 KiB random read, depth 16, Unix socket", "randread", KIB4, 16, counting=True),
    Row("4 KiB random read, depth 64, TCP", "randread", KIB4, 64, tcp=True, counting=True),
    Row("4 KiB random write, depth 1, Unix socket", "randwrite", KIB4, 1),
    Row("4 KiB random write, depth 16, Unix socket", "randwrite", KIB4, 16, counting=True),
    Row("4 KiB random read, depth 16, TLS", "randread", KIB4, 16, tcp=True, tls=True),
    Row("1 MiB sequential read, depth 8, Unix socket", "read", MIB1, 8),
    Row("1 MiB sequential write, depth 8, Unix socket", "write", MIB1, 8),
    Row("1 MiB sequential read, depth 8, TCP", "read", MIB1, 8, tcp=True),
)
LAYOUTS = ("flat", "qed")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.quick", description=__doc__)
    parser.add_argument(
        "--against", default="HEAD~1", help="a revision, or the directory of a checkout (HEAD~1)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of each row (9)")
    parser.add_argument("--seconds", type=float, default=0.6, help="of each measurement (0.6)")
    parser.add_argument("--size", type=int, default=256, help="of the disk in MiB (256)")
    parser.add_argument("--directory", type=Path, help="where disks lie (default: in memory)")
    parser.add_argument("--least", type=float, default=0.0, help="ratio below which a row is slower (0)")
    parser.add_argument("--row", default="", help="only rows whose name contains this")
    return parser.parse_args()


def server_of(version: Version) -> Contender:
    """A version's server as a contender."""

    def start(task: Task) -> AbstractContextManager[Server]:
        options = task.options("--read-only", f"--tls-certificates={task.identity}", "--tls-require")
        return nbdserve(
            "--format=raw", *options, task.image,
            directory=task.directory, at=task.at, program=version.command("nbdserve"),
        )  # fmt: skip

    return Contender(version.name, "", lambda: version.name, start)


def streams(
    versions: tuple[Version, Version], layout: str, given: argparse.Namespace, directory: Path
) -> Comparison:
    """How fast an overlay of this layout fills, from one server for both."""
    rates: tuple[list[float], list[float]] = [], []
    size = given.size * MIB
    at = UnixAddress(fresh_path(directory, "source", ".sock"))
    with nbdserve("-r", "-f", "raw", directory / "disk.img", directory=directory, at=at):
        for order in turns(len(versions), given.rounds):
            for each in order:
                touch_memory(directory, size)
                with overlay(layout, versions[each].command("nbd-overlay"))(at, size, directory) as filler:
                    rates[each].append(given.size / filler.fill())
    return Comparison(f"streaming, {layout}", "MiB/s", *rates)


def figures(
    given: argparse.Namespace, directory: Path, tell: Callable[[Comparison], None]
) -> list[Comparison]:
    """Measure everything that was asked for."""
    found: list[Comparison] = []
    with ExitStack() as stack:
        versions = (Version("this", HERE), stack.enter_context(checked_out(given.against, directory)))
        contenders = [server_of(version) for version in versions]
        trust = Trust.create(directory / "pki")
        for row in ROWS:
            if given.row in row.name:
                image = directory / "disk.img"
                ours, theirs = measure(row, contenders, image, directory, trust, given.rounds, given.seconds)
                found.append(Comparison(row.name, row.unit.value, ours.rates, theirs.rates))
                tell(found[-1])
        for layout in LAYOUTS:
            if given.row in f"streaming, {layout}":
                found.append(streams(versions, layout, given, directory))
                tell(found[-1])
    return found


def main() -> int:
    """Run the benchmark."""
    given = arguments()
    size = given.size * MIB
    with tempfile.TemporaryDirectory(dir=image_directory(4 * size, given.directory)) as scratch:
        directory = Path(scratch)
        directory.chmod(0o755)
        write_image(directory / "disk.img", given.size)
        print(f"this version beside {given.against}: ratio [its interval], {given.rounds} rounds", flush=True)
        found = figures(given, directory, lambda row: print(row, flush=True))
    slower = [row.name for row in found if row.interval[1] < given.least]
    unsure = [row.name for row in found if row.ratio < given.least <= row.interval[1]]
    if slower:
        print(f"slower than {given.least:g} of before: {'; '.join(slower)}")
    if unsure:
        print(f"perhaps slower than {given.least:g} of before, more rounds tell: {'; '.join(unsure)}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
