"""What is measured. A new measurement is a new row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Unit(Enum):
    """What a row counts, per second."""

    OPERATIONS = "thousand operations/s"
    MEBIBYTES = "MiB/s"


@dataclass(frozen=True)
class Row:
    """One fio job, run against every contender in turn."""

    name: str
    access: str
    """fio's ``rw``: randread, read, randwrite, write."""
    block: int
    """The size of a request in bytes."""
    depth: int
    """Requests in flight on each connection."""
    connections: int = 1
    tcp: bool = False
    """Over TCP on the loopback instead of a Unix socket."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """What nbdserve's figure divided by this contender's must be at least."""

    @property
    def writes(self) -> bool:
        """Whether the servers must allow writing."""
        return "write" in self.access

    @property
    def unit(self) -> Unit:
        """Small requests are counted, large ones weighed."""
        return Unit.OPERATIONS if self.block < 1 << 16 else Unit.MEBIBYTES


KIB4 = 4 << 10
MIB1 = 1 << 20

ROWS = [
    Row("4 KiB random read, depth 16", "randread", KIB4, 16, targets={"qemu-nbd": 3.0, "nbdkit": 1.3}),
    Row("1 MiB sequential read, depth 16", "read", MIB1, 16, targets={"qemu-nbd": 1.5, "nbdkit": 1.5}),
    Row("4 KiB random read, depth 1", "randread", KIB4, 1),
    Row("4 KiB random read, depth 64", "randread", KIB4, 64),
    Row("4 KiB random read, depth 16, 8 connections", "randread", KIB4, 16, connections=8),
    Row("4 KiB random read, depth 16, TCP", "randread", KIB4, 16, tcp=True),
    Row("4 KiB random write, depth 16", "randwrite", KIB4, 16),
    Row("1 MiB sequential write, depth 16", "write", MIB1, 16),
]
