"""What works in the guest: ``python3 workload.py DEVICE PORT RATE``, with nothing but the standard library.

It writes to the disk and reads from it, each RATE times a second, past the guest's cache, and says for each
how long it took: ``w NUMBER MICROSECONDS`` or ``r NUMBER MICROSECONDS``; ``! WHY`` if one fails.

Writes go to the first eighth of the disk, where a guest has its hot blocks; reads go everywhere. Who is late
does not make up for it: what takes long comes less often.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections.abc import Callable

WRITTEN = 16 << 10
"""Bytes of each write."""

READ = 4 << 10
"""Bytes of each read."""

HOT = 8
"""One part of so many of the disk is written to."""


class Port:
    """Where it is told what was done."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_NOCTTY)
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        """One line."""
        with self._lock:
            os.write(self._fd, f"{line}\n".encode())


def place(length: int, end: int) -> int:
    """Anywhere before ``end``, as ``length`` bytes at a time go."""
    return int.from_bytes(os.urandom(8), "little") % (end // length) * length


def work(kind: str, operate: Callable[[], None], rate: float, port: Port) -> None:
    """Do it ``rate`` times a second, for ever."""
    number, due = 0, time.monotonic()
    while True:
        began = time.monotonic_ns()
        try:
            operate()
        except OSError as error:
            port.say(f"! {kind}: {error.strerror}")
            return
        number += 1
        port.say(f"{kind} {number} {(time.monotonic_ns() - began) // 1000}")
        due = max(due + 1 / rate, time.monotonic())
        time.sleep(due - time.monotonic() if due > time.monotonic() else 0)


def main() -> None:
    """Work until the machine ends."""
    device, port, rate = sys.argv[1], Port(sys.argv[2]), float(sys.argv[3])
    disk = os.open(device, os.O_RDWR | os.O_DIRECT)
    size = os.lseek(disk, 0, os.SEEK_END)
    # Memory of its own begins at a page, as O_DIRECT wants it.
    given, taken = mmap.mmap(-1, WRITTEN), mmap.mmap(-1, READ)
    given[:] = os.urandom(WRITTEN)

    def write() -> None:
        given[:8] = time.monotonic_ns().to_bytes(8, "little")
        os.pwritev(disk, [given], place(WRITTEN, size // HOT))

    def read() -> None:
        os.preadv(disk, [taken], place(READ, size))

    reader = threading.Thread(target=work, args=("r", read, rate, port))
    reader.start()
    work("w", write, rate, port)


if __name__ == "__main__":
    main()
