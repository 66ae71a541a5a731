"""What a link can carry, and at what cost: ``python -m tests.bench.migrate.capacity send|receive``."""

from __future__ import annotations

import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.bench.migrate.hosts import ADDRESSES, DISK_PORT, Link, hosts
from tests.support.disks import MIB
from tests.support.processes import Process, check
from tests.support.servers import fresh_path
from tests.support.vms import ROOT

AMOUNT = 512 * MIB
"""Bytes that are sent, from A to B."""


@dataclass(frozen=True)
class Capacity:
    """Bytes per second, and how busy the link kept a processor meanwhile (0 to 1, or more)."""

    rate: float
    processor: float


def capacity(link: Link, directory: Path) -> Capacity:
    """Send AMOUNT over a link."""
    module = (sys.executable, "-m", "tests.bench.migrate.capacity")
    log = fresh_path(directory, "capacity", ".log")
    with hosts(link, directory) as made, Process(made.on("a", *module, "send"), log, cwd=ROOT) as sender:
        sender.wait_for_line("ready")
        carrier = psutil.Process(made.proxy.pid) if made.proxy else None
        before = sum(carrier.cpu_times()[:2]) if carrier else 0.0
        seconds = float(check(*made.on("b", *module, "receive"), cwd=ROOT))
        spent = sum(carrier.cpu_times()[:2]) - before if carrier else 0.0
    return Capacity(AMOUNT / seconds, spent / seconds)


def send() -> None:
    """On A: send to whoever connects."""
    with socket.create_server((ADDRESSES["a"], DISK_PORT)) as listener:
        print("ready", flush=True)
        with listener.accept()[0] as client:
            for _ in range(AMOUNT // MIB):
                client.sendall(bytes(MIB))


def receive() -> None:
    """On B: receive it, and print how many seconds that took."""
    buffer, began = bytearray(MIB), time.monotonic()
    with socket.create_connection((ADDRESSES["a"], DISK_PORT)) as server:
        while server.recv_into(buffer):
            pass
    print(time.monotonic() - began)


if __name__ == "__main__":
    {"send": send, "receive": receive}[sys.argv[1]]()
