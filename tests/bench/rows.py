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
class ClientRun:
    """What one run of a client achieved."""

    operations: int
    bytes: int
    seconds: float
    processor: float
    """The processor time of the client's busiest connection, as a share of one processor."""
    processor_seconds: float
    """The processor time of all its connections together."""


@dataclass(frozen=True)
class Row:
    """What a client does, against every contender in turn."""

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
    tls: bool = False
    """Encrypted, with certificates."""
    counting: bool = False
    """By the counting client instead of fio: see counting.py."""
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
PEERS = ("qemu-nbd", "nbdkit", "nbd-server")


def against_all(least: float) -> dict[str, float]:
    """The same target against every peer, that is, against the best of them."""
    return dict.fromkeys(PEERS, least)


def transport_rows(where: str, *, tcp: bool, tls: bool = False) -> list[Row]:
    """Small requests at three depths and large ones, over one transport."""
    rows = []
    for kind, access in (("read", "randread"), ("write", "randwrite")):
        for depth, least in ((1, 1.0), (16, 1.4), (64, 1.6)):
            targets = against_all(1.0 if tls else least)
            if (kind, depth, tcp) == ("read", 16, False):
                targets["qemu-nbd"] = 3.0
            name = f"4 KiB random {kind}, depth {depth}, {where}"
            rows.append(Row(name, access, KIB4, depth, tcp=tcp, tls=tls, targets=targets))
            if depth > 1 and not tls:
                name += ", counting client"
                rows.append(Row(name, access, KIB4, depth, tcp=tcp, counting=True, targets=targets))
    for kind in ("read", "write"):
        name = f"1 MiB sequential {kind}, depth 8, {where}"
        rows.append(Row(name, kind, MIB1, 8, tcp=tcp, tls=tls, targets=against_all(1.0 if tls else 1.5)))
    return rows


ROWS = [
    *transport_rows("Unix socket", tcp=False),
    *transport_rows("TCP", tcp=True),
    *transport_rows("TLS", tcp=True, tls=True),
    Row("4 KiB random read, depth 16, 8 connections", "randread", KIB4, 16, 8, targets=against_all(1.0)),
    Row("4 KiB random write, depth 16, 8 connections", "randwrite", KIB4, 16, 8, targets=against_all(1.0)),
]
