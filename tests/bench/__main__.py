"""``python -m tests.bench``: measure, print the tables, and write them where ``--output`` says."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.bench.contenders import CONTENDERS, OURS
from tests.bench.machine import LoadOfOthers, describe_machine
from tests.bench.measure import Result, measure
from tests.bench.memory import measure_memory
from tests.bench.rows import ROWS
from tests.bench.table import NOTES, introduction, memory_section, section, summary, written_by_hand
from tests.bench.trust import Trust
from tests.support.disks import MIB

MEMORY = Path("/dev/shm")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one short round on a small image")
    parser.add_argument("--rounds", type=int, default=3, help="how often each server is measured per row (3)")
    parser.add_argument("--seconds", type=float, default=0.6, help="how long each measurement lasts (0.6)")
    parser.add_argument("--size", type=int, default=512, help="the image's size in MiB (512)")
    parser.add_argument("--directory", type=Path, help="where the image lies (default: in memory)")
    parser.add_argument("--row", default="", help="only rows whose name contains this")
    parser.add_argument("--server", default="", help="only compare with servers whose name contains this")
    parser.add_argument("--output", type=Path, help="write the page to this file as well")
    parser.add_argument(
        "--real-time",
        action="store_true",
        help="servers and clients go before all other programs (needs root)",
    )
    chosen = parser.parse_args()
    chosen.idle = None
    if chosen.quick:
        chosen.rounds, chosen.seconds, chosen.size, chosen.idle = 1, 0.1, 16, 20
    return chosen


def image_directory(size: int, wanted: Path | None) -> Path | None:
    """Where to put the image: as asked for, else in memory if it fits, else where temporary files go."""
    if wanted is not None or not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < 2 * size:
        return wanted
    return MEMORY


def main() -> None:
    """Run the benchmark."""
    chosen = arguments()
    rows = [row for row in ROWS if chosen.row in row.name]
    contenders = [OURS, *(other for other in CONTENDERS if other is not OURS and chosen.server in other.name)]
    size = chosen.size * MIB
    with tempfile.TemporaryDirectory(dir=image_directory(size, chosen.directory)) as scratch:
        directory = Path(scratch)
        # Who is not root looks for what to trust in here.
        directory.chmod(0o755)
        image = directory / "disk.img"
        write_image(image, chosen.size)
        start = introduction(contenders, describe_machine(image))
        trust = Trust.create(directory / "pki")
        if chosen.real_time:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
        load, results = LoadOfOthers(), list[list[Result]]()
        for row in rows:
            print(row.name, file=sys.stderr, flush=True)
            results.append(measure(row, contenders, image, directory, trust, chosen.rounds, chosen.seconds))
        how = conditions(chosen, results, load)
        memory = memory_section(measure_memory(contenders, image, directory, chosen.idle))
    page = "\n".join([start, summary(results), NOTES, how, "", memory, *map(section, results)])
    print(page)
    if chosen.output:
        chosen.output.write_text(f"{page}\n{written_by_hand(chosen.output)}")


def write_image(path: Path, mebibytes: int) -> None:
    """Write random data, which then lies in the page cache."""
    with path.open("wb") as image:
        for _ in range(mebibytes):
            image.write(os.urandom(MIB))


def conditions(chosen: argparse.Namespace, results: list[list[Result]], load: LoadOfOthers) -> str:
    """How often and how long was measured, and how busy the machine was with something else."""
    samples = [sample for row in results for result in row for sample in result.samples]
    others = load.share(sum(sample.server_seconds + sample.client_seconds for sample in samples))
    priority = "real-time priority for servers and clients" if chosen.real_time else "the usual priority"
    return (
        f"Rounds: {chosen.rounds}, of {chosen.seconds:g} s for each server, with {priority}. "
        f"Other programs, and starting clients, took {others:.0%} of the processors' time."
    )


if __name__ == "__main__":
    main()
