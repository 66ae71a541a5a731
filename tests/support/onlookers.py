"""Who else is on the network: one that listens to a cable, and one that connects to whatever is open.

python -m tests.support.onlookers wire DEVICE FILE       every frame that passes, to FILE
python -m tests.support.onlookers flows DEVICE FILE      in the end, as JSON, how many bytes went in each
                                                         connection of TCP (its two ends, sorted)
python -m tests.support.onlookers stranger FILE HOST:PORT [HOST:PORT]
                                                         what the ports of disk and RAM say, to FILE.0, .1
"""

from __future__ import annotations

import json
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_EVERYTHING = 3
"""ETH_P_ALL."""

_HEADERS = 256
"""Bytes of a frame in which its headers are."""

PAUSE = 0.05
"""Seconds between two visits."""

SECONDS = 1.0
"""For which a stranger listens."""


@contextmanager
def tapped(device: str) -> Iterator[socket.socket]:
    """Each frame that passes here."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as tap:
        tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 << 20)
        tap.bind((device, _EVERYTHING))
        print("listening", flush=True)
        yield tap


def wire(device: str, file: Path) -> None:
    """Keep what passes."""
    with file.open("wb") as kept, tapped(device) as tap:
        while True:
            kept.write(tap.recv(1 << 16))


def flows(device: str, file: Path) -> None:
    """Count what passes, for each connection; one that was refused is none."""
    counted: dict[str, int] = {}
    try:
        with tapped(device) as tap:
            while True:
                for ends, count in _of_tcp(tap.recv(_HEADERS)):
                    counted[ends] = counted.get(ends, 0) + count
    finally:
        file.write_text(json.dumps({ends: count for ends, count in counted.items() if count}))


def _of_tcp(frame: bytes) -> Iterator[tuple[str, int]]:
    """The two ends of a segment of TCP over IPv4, and the bytes that it carries."""
    kind, first = frame[12:14], frame[14:15]
    if kind != b"\x08\x00" or first[0] >> 4 != 4 or frame[23] != socket.IPPROTO_TCP:
        return
    start = 14 + 4 * (first[0] & 15)
    source, target = struct.unpack_from(">HH", frame, start)
    ends = [f"{socket.inet_ntoa(frame[at : at + 4])}:{port}" for at, port in ((26, source), (30, target))]
    length = struct.unpack_from(">H", frame, 16)[0]
    yield " ".join(sorted(ends)), length - (start - 14) - 4 * (frame[start + 12] >> 4)


def stranger(file: Path, ports: list[str]) -> None:
    """Connect again and again, ask for all there is, and keep what comes."""
    asks = [_asked_of_disk(), b"QEVM" + bytes(64)]
    print("visiting", flush=True)
    kept = [file.with_name(f"{file.name}.{number}").open("wb", buffering=0) for number in range(len(ports))]
    while True:
        for port, words, into in zip(ports, asks, kept, strict=False):
            host, _, number = port.rpartition(":")
            with suppress(OSError), socket.create_connection((host, int(number)), SECONDS) as visit:
                into.write(b"connected\n")
                visit.sendall(words)
                while data := visit.recv(1 << 16):
                    into.write(data)
        time.sleep(PAUSE)


def _asked_of_disk() -> bytes:
    """An export's name without any haggling, and a read of its beginning."""
    name = b"vm"
    export = struct.pack(">IQII", 1, 0x49484156454F5054, 1, len(name)) + name
    return export + struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 1 << 20)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    what, *rest = sys.argv[1:]
    if what == "stranger":
        stranger(Path(rest[0]), rest[1:])
    else:
        {"wire": wire, "flows": flows}[what](rest[0], Path(rest[1]))
