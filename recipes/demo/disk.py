"""The demo's disk: made of a seed, so that the original can be computed again to compare the copy with it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from nbdserve.common.errors import OperatorError

CHUNK = 1 << 20  # bytes that are computed and compared at a time
HOLE = 15  # of sixteen chunks the last one is a hole, as real disks have some
BLOCK = 4096  # bytes; the grain in which differences are counted
READ_LIMIT = 600.0  # seconds to read the whole copy


@dataclass(frozen=True)
class Original:
    """The content of the source's disk before any guest ran: random bytes that follow from the seed.

    size  bytes
    """

    size: int
    seed: bytes = field(default_factory=lambda: os.urandom(16))

    def chunk(self, index: int) -> bytes:
        """Chunk ``index`` of the disk; the last one may be shorter than CHUNK."""
        length = min(CHUNK, self.size - index * CHUNK)
        if index % 16 == HOLE:
            return bytes(length)
        return hashlib.shake_128(self.seed + index.to_bytes(8)).digest(length)

    @property
    def chunks(self) -> range:
        """Return the index of every chunk."""
        return range(-(-self.size // CHUNK))

    def write(self, image: Path) -> None:
        """Write a raw image with holes where the zeroes are."""
        with image.open("wb") as file:
            for index in self.chunks:
                if index % 16 != HOLE:
                    file.seek(index * CHUNK)
                    file.write(self.chunk(index))
            file.truncate(self.size)


@dataclass(frozen=True)
class Comparison:
    """What comparing a copy with the original has shown.

    compared   bytes that were compared
    excepted   bytes that were not, as the guest has written them
    different  4 KiB blocks that differ
    first      offset of the first byte that differs, or None
    """

    compared: int
    excepted: int
    different: int
    first: int | None

    @property
    def equal(self) -> bool:
        """Tell whether all that was compared is as it was."""
        return self.different == 0


def compare(original: Original, image: Path, layout: str, written: Iterable[tuple[int, int]]) -> Comparison:
    """Compare every byte of an image with the original, except the ascending extents that the guest wrote.

    The image is read by other people's programs, qemu-nbd and nbdcopy; nothing may have it open for writing.
    ``layout`` is QEMU's name of its format; extents are offsets and lengths in bytes.
    Raises OperatorError when the image cannot be read, or has another size.
    """
    excepted = deque(written)
    untouched = original.size - sum(length for _, length in excepted)
    size, different, first = 0, 0, None
    with _content(image, layout) as content:
        for index in original.chunks:
            expected, found = bytearray(original.chunk(index)), content.read(CHUNK)
            size += len(found)
            if len(found) != len(expected):
                break
            for offset, length in _within(excepted, index * CHUNK, len(found)):
                expected[offset : offset + length] = found[offset : offset + length]
            if found != expected:
                differences = [at for at in range(len(found)) if found[at] != expected[at]]
                different += len({at // BLOCK for at in differences})
                first = index * CHUNK + differences[0] if first is None else first
        while rest := content.read(CHUNK):
            size += len(rest)
    if size != original.size:
        raise OperatorError(f"{image}: has {size} bytes, the original had {original.size}")
    return Comparison(untouched, original.size - untouched, different, first)


def _within(extents: deque[tuple[int, int]], start: int, length: int) -> Iterator[tuple[int, int]]:
    """Take from ascending extents what lies below start + length, as offsets from ``start`` and lengths."""
    end = start + length
    while extents and extents[0][0] < end:
        offset, size = extents.popleft()
        if offset + size > end:
            extents.appendleft((end, offset + size - end))
            size = end - offset
        yield offset - start, size


@contextmanager
def _content(image: Path, layout: str) -> Iterator[IO[bytes]]:
    """Return a stream of an image's content; OperatorError at the end of the block if its readers have
    failed.
    """
    argv = ["nbdcopy", "--", "[", "qemu-nbd", "-r", "-f", layout, str(image), "]", "-"]
    with tempfile.TemporaryFile() as complaints:
        reader = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
        )
        assert reader.stdout is not None
        limit = threading.Timer(READ_LIMIT, reader.kill)
        limit.start()
        try:
            yield reader.stdout
            status = reader.wait()
        finally:
            limit.cancel()
            reader.kill()
            reader.wait()
            reader.stdout.close()
        if status != 0:
            complaints.seek(0)
            said = " ".join(complaints.read().decode(errors="replace").split())
            raise OperatorError(
                f"{image}: nbdcopy and qemu-nbd cannot read it: {said or f'exit status {status}'}"
            )
