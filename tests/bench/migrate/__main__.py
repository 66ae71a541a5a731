"""``python -m tests.bench.migrate``: move a guest in every way, print the page, write it to ``--output``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbdserve.common.sizes import parse_size
from tests.bench.machine import describe_machine
from tests.bench.measure import turns
from tests.bench.migrate import guest as guests
from tests.bench.migrate import page
from tests.bench.migrate.capacity import capacity
from tests.bench.migrate.contenders import CONTENDERS, Contender
from tests.bench.migrate.guest import Guest
from tests.bench.migrate.hosts import LINKS, Link
from tests.bench.migrate.page import Part
from tests.bench.migrate.run import attempt
from tests.bench.migrate.sample import Sample
from tests.bench.table import written_by_hand
from tests.support.disks import MIB
from tests.support.processes import check

MEMORY, DISK = Path("/dev/shm"), Path("/var/tmp")


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.migrate", description=__doc__)
    parser.add_argument("--size", default="4G", help="of the guest's disk (4G)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender moves the guest (3)")
    parser.add_argument(
        "--directory", type=Path, action="append", help=f"where disks lie; may be repeated ({MEMORY}, {DISK})"
    )
    parser.add_argument("--link", action="append", help="; ".join(each.name for each in LINKS) + " (all)")
    parser.add_argument(
        "--contender", action="append", help="; ".join(each.name for each in CONTENDERS) + " (all)"
    )
    parser.add_argument(
        "--rate", type=float, default=50.0, help="the guest's writes, and reads, a second (50)"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="watched before and after (6)")
    parser.add_argument("--output", type=Path, help="write the page to this file as well")
    chosen = parser.parse_args(words)
    for name, known in (("link", LINKS), ("contender", CONTENDERS)):
        names = [each.name for each in known]
        for each in getattr(chosen, name) or ():
            if each not in names:
                parser.error(f"--{name}: there is no {each!r}: {', '.join(names)}")
    chosen.size = parse_size(chosen.size, "--size")
    chosen.directory = chosen.directory or [MEMORY, DISK]
    return chosen


def main() -> None:
    """Run the benchmark."""
    chosen = arguments()
    # Who is told to end ends what was started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    wanted = [each for each in CONTENDERS if not chosen.contender or each.name in chosen.contender]
    there = [each for each in wanted if each.is_there]
    missing = [
        f"`nbd-migrate` does not know `--policy {each.policy}` yet: {each.name} is left out."
        for each in wanted
        if each not in there
    ]
    print(*missing, sep="\n", file=sys.stderr)
    links = [each for each in LINKS if not chosen.link or each.name in chosen.link]
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        guest = guests.build(Path(scratch), chosen.rate)
        described = describe_machine(guest.initramfs)
        machine = {
            **{what: described[what] for what in ("date", "processors", "kernel", "Python")},
            "QEMU": check("qemu-system-x86_64", "--version").splitlines()[0],
            "load average before it began": f"{os.getloadavg()[0]:.1f}",
            "guest": page.load(chosen.rate, chosen.size),
        }
        parts = list(measured(chosen, there, links, guest))
    text = "\n".join([page.introduction(machine, there, missing), *(page.section(each) for each in parts)])
    print(text)
    if chosen.output:
        chosen.output.write_text(f"{text}\n{written_by_hand(chosen.output)}")


def measured(
    chosen: argparse.Namespace, contenders: Sequence[Contender], links: Sequence[Link], guest: Guest
) -> Iterator[Part]:
    """Measure in each directory, on each link."""
    for place in chosen.directory:
        with tempfile.TemporaryDirectory(dir=place, prefix="bench-") as scratch:
            filesystem = check("stat", "--file-system", "--format=%T", scratch).strip()
            for link in links:
                image = disk(Path(scratch), link.disk(chosen.size))
                samples: dict[str, list[Sample]] = {each.name: [] for each in contenders}
                failures = []
                carried = capacity(link, guest.initramfs.parent)
                for order in turns(len(contenders), chosen.rounds):
                    for each in (contenders[number] for number in order):
                        found = attempt(each, link, guest, image, chosen.seconds)
                        print(f"{filesystem}, {link.name}, {each.name}: {found}", file=sys.stderr)
                        if isinstance(found, Sample):
                            samples[each.name].append(found)
                        else:
                            failures.append(f"{each.name} failed in a round: {found}")
                yield Part(link, filesystem, image.stat().st_size, carried, samples, failures)


def disk(directory: Path, size: int) -> Path:
    """Return a disk of random data of this size; it is made where it is not there."""
    path = directory / f"a-{size}.raw"
    if not path.exists():
        with path.open("wb") as image:
            for _ in range(size // MIB):
                image.write(os.urandom(MIB))
    return path


if __name__ == "__main__":
    main()
