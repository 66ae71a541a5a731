"""Two hosts, as network namespaces, and one of the links between them.

On the link without limits they are joined by a cable. On the others each host has the other's address as
well, at which the proxy listens that is the link: so who connects to the other host goes through it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.migrate import link as proxy
from tests.bench.migrate.link import Passage
from tests.support.disks import MIB
from tests.support.processes import Process, check
from tests.support.servers import fresh_path
from tests.support.vms import ROOT

ADDRESSES = {"a": "10.98.0.1", "b": "10.98.0.2"}
DISK_PORT, RAM_PORT, TARGET_PORT = 10809, 4444, 10810
"""Where A serves its disk, where B waits for the RAM, and where B takes what a mirror writes."""

SMALLEST = 16 * MIB
"""Of the disks that are a part of one."""

GIGABIT = 125_000_000
"""Bytes per second."""


@dataclass(frozen=True)
class Link:
    """What is between the hosts.

    rate  bytes per second, or None: a cable without limits
    trip  seconds of round trip
    part  one of so many parts of the disk is moved, as QEMU's own streaming would take an hour for all of it
    """

    name: str
    rate: float | None = None
    trip: float = 0.0
    part: int = 1

    def disk(self, size: int) -> int:
        """Return the size of the disk that is moved over this link where that of the others is ``size``."""
        return max(min(size, SMALLEST), size // self.part // MIB * MIB)


LINKS = (
    Link("cable"),
    Link("0 ms", GIGABIT),
    Link("20 ms", GIGABIT, 0.02, 8),
    Link("100 ms", GIGABIT, 0.1, 32),
    Link("20 ms, 10 Gbit/s", 10 * GIGABIT, 0.02, 8),
)
"""The last one is for how far apart hosts are to count, and not what goes through the link in a second."""


@dataclass(frozen=True)
class Hosts:
    """The two hosts, as long as they are there."""

    mark: str
    proxy: Process | None
    counted: Path

    def name(self, host: str) -> str:
        """Return the namespace of host ``a`` or ``b``."""
        return f"bench-{host}-{self.mark}"

    def on(self, host: str, *words: object) -> list[str]:
        """Return a command of a host."""
        return ["ip", "netns", "exec", self.name(host), *map(str, words)]

    def passed(self) -> int:
        """End the link, and return how many bytes have gone over it, in both directions."""
        if self.proxy:
            self.proxy.terminate()
            return int(self.counted.read_text())
        shown = check("ip", "-n", self.name("a"), "-j", "-s", "link", "show", "eth0")
        counts = json.loads(shown)[0]["stats64"]
        return int(counts["rx"]["bytes"]) + int(counts["tx"]["bytes"])


@contextmanager
def hosts(link: Link, directory: Path) -> Iterator[Hosts]:
    """Make them; it needs root."""
    made = Hosts(str(os.getpid()), None, directory / "counted")
    with ExitStack() as stack:
        for host in ADDRESSES:
            check("ip", "netns", "add", made.name(host))
            stack.callback(check, "ip", "netns", "delete", made.name(host))
            check("ip", "-n", made.name(host), "link", "set", "lo", "up")
        if link.rate is None:
            join(made)
            yield made
            return
        for host, own in ADDRESSES.items():
            here = ("ip", "-n", made.name(host))
            for address in ADDRESSES.values():
                check(*here, "address", "add", f"{address}/32", "dev", "lo")
            # Who connects to the other one comes from this one.
            for address in ADDRESSES.values():
                route = ("local", address, "dev", "lo", "table", "local", "src", own)
                check(*here, "route", "replace", *route)
        a, b = made.name("a"), made.name("b")
        passages = [
            Passage(b, a, ADDRESSES["a"], DISK_PORT, ADDRESSES["b"]),
            Passage(a, b, ADDRESSES["b"], RAM_PORT, ADDRESSES["a"]),
            Passage(a, b, ADDRESSES["b"], TARGET_PORT, ADDRESSES["a"]),
        ]
        words = proxy.arguments(link.rate, link.trip, made.counted, passages)
        log = fresh_path(directory, "link", ".log")
        running = stack.enter_context(Process(words, log, cwd=ROOT))
        running.wait_for_line("ready")
        yield Hosts(made.mark, running, made.counted)


def join(made: Hosts) -> None:
    """Lay a cable between them."""
    ends = [("name", "eth0", "netns", made.name(host)) for host in ADDRESSES]
    check("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
    for host, address in ADDRESSES.items():
        check("ip", "-n", made.name(host), "address", "add", f"{address}/24", "dev", "eth0")
        check("ip", "-n", made.name(host), "link", "set", "eth0", "up")
