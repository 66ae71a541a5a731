"""``python -m tests.soak [--millions N] [--rounds N]``: many clients against one nbdserve, for a long time.

In each round clients of every kind work, crash, nag and leave; then, with nobody connected, the server's
memory, descriptors and threads are looked at. The exit code says whether they were the same in every round.
"""

from __future__ import annotations

import argparse
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from tests.soak.batches import REGION, Mode
from tests.soak.clients import Deaf, Distant, Passerby, Quota, Worker
from tests.soak.operators import Operator, Scraper
from tests.soak.watch import Sample, Watch, sample, trend
from tests.support.disks import KIB, MIB, random_disk
from tests.support.processes import wait_until
from tests.support.servers import Address, Server, UnixAddress, free_tcp_address, nbdkit, nbdserve
from tests.support.tls import Authority, client_context

WORKERS = 6
SIZE = WORKERS * REGION
TOLERANCES = Sample(memory=2 * MIB, descriptors=1, threads=1)
"""What may be more at the end than at the beginning, over the whole run: 0.1 bytes a request."""
GIVES_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
}
"""Lets the C library keep nothing for later, so that what the server holds itself can be seen."""


class Client(Protocol):
    """Works until the quota is used up; AssertionError or OSError when the server did wrong."""

    def work(self, quota: Quota) -> None: ...


class Scene:
    """A server with everything that it can have, and whoever uses it."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        random_disk(directory / "disk.img", SIZE)
        random_disk(directory / "guest.img", MIB)
        authority = Authority.create(directory / "authority")
        identity = authority.issue(directory / "server", "server")
        trusting = client_context(authority.issue(directory / "client", "client"))
        far = stack.enter_context(nbdkit("memory", "32M", directory=directory))
        self.scraper = Scraper(free_tcp_address())
        tcp, unix, monitor = free_tcp_address(), UnixAddress(directory / "nbd.sock"), directory / "qmp.sock"
        self.server: Server = stack.enter_context(
            nbdserve(
                f"--export=disk={directory}/disk.img,format=raw",
                f"--export=far={far.uri()}",
                f"--listen={tcp.uri()}",
                f"--tls-certificates={identity}",
                f"--metrics={self.scraper.address.host}:{self.scraper.address.port}",
                f"--qmp=unix:{monitor}",
                directory=directory,
                at=unix,
                env=GIVES_BACK,
            )
        )  # fmt: skip
        kinds: list[tuple[Address, Mode, ssl.SSLContext | None]] = [
            (unix, Mode.SIMPLE, None),
            (unix, Mode.STRUCTURED, None),
            (unix, Mode.EXTENDED, None),
            (tcp, Mode.SIMPLE, None),
            (tcp, Mode.STRUCTURED, trusting),
            (tcp, Mode.EXTENDED, None),
        ]
        self.clients: list[Client] = [
            *(Worker(at, mode, number * REGION, SIZE, tls) for number, (at, mode, tls) in enumerate(kinds)),
            *(Passerby(at) for at in (unix, tcp)),
            Deaf(tcp),
            Distant(unix),
            Operator(monitor, unix, directory / "guest.img"),
            self.scraper,
        ]

    def play(self, requests: int) -> int:
        """One round: all clients at once, until so many requests have been answered; return how many."""
        quota, failures = Quota(requests), list[BaseException]()

        def work(client: Client) -> None:
            try:
                client.work(quota)
            except BaseException as error:
                failures.append(error)
                quota.take(requests)
                raise

        threads = [threading.Thread(target=work, args=(client,)) for client in self.clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        wait_until(lambda: self.scraper.connections() == 0, "all clients have left", 30)
        return quota.answered


def main(arguments: Sequence[str]) -> int:
    """Play the rounds, one line each, and say what is true of all."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--millions", type=float, default=20.0, help="requests in all, in millions (20)")
    parser.add_argument("--rounds", type=int, default=20, help="into how many rounds they are divided (20)")
    chosen = parser.parse_args(arguments)
    requests = int(chosen.millions * 1e6 / chosen.rounds)
    began, answered = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="nbd-soak-") as name, ExitStack() as stack:
        scene = Scene(Path(name), stack)
        quiet: list[Sample] = []
        with Watch(scene.server.pid) as watch:
            for number in range(chosen.rounds):
                answered += scene.play(requests)
                quiet.append(sample(scene.server.pid))
                print(f"{number + 1:3}  {answered / 1e6:7.2f} million  {told(quiet[-1])}", flush=True)
        seconds = time.monotonic() - began
        print(f"{answered} requests answered as they must be in {seconds:.0f} s; the most at any time: "
              f"{told(watch.peak)} ({watch.samples} samples)")  # fmt: skip
        return 0 if verdict(quiet) else 1


def told(held: Sample) -> str:
    """A sample as text."""
    return f"{held.memory // KIB:7} KiB  {held.descriptors:4} descriptors  {held.threads:3} threads"


def verdict(quiet: Sequence[Sample]) -> bool:
    """Say for each quantity whether it is flat."""
    flat = True
    for quantity, values, tolerance in zip(Sample._fields, zip(*quiet, strict=True), TOLERANCES, strict=True):
        found = trend(values)
        flat = flat and found.is_flat(tolerance)
        print(f"{quantity:<12} slope {found.slope:+10.1f}  last less first quarter {found.step:+10.1f}  "
              f"allowed {tolerance:8}  {'flat' if found.is_flat(tolerance) else 'GROWS'}")  # fmt: skip
    return flat


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
