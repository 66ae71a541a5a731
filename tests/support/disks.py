"""Disk images with known content."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

KIB = 1024
MIB = 1024 * KIB

# Not a multiple of a sector, nor of any cluster: what must be exact to the byte.
ODD_SIZE = 3 * MIB + 12345


@dataclass(frozen=True)
class Run:
    """A run of bytes of an image: data, or a hole that reads as zeros."""

    offset: int
    length: int
    data: bool


def random_bytes(size: int, seed: int = 1) -> bytes:
    """The same ``size`` bytes for the same seed, with no 4 KiB of zeros in them."""
    return random.Random(seed).randbytes(size)


def random_disk(path: Path, size: int, seed: int = 1) -> bytes:
    """Write an image without holes and return its content. ``size`` is in bytes."""
    content = random_bytes(size, seed)
    path.write_bytes(content)
    return content


def sparse_runs(size: int, grain: int = 64 * KIB) -> list[Run]:
    """Data and holes in turn, of one to several grains each, that together cover ``size`` bytes."""
    generator = random.Random(size)
    runs: list[Run] = []
    offset = 0
    while offset < size:
        length = min(grain * generator.randint(1, 5), size - offset)
        runs.append(Run(offset, length, data=len(runs) % 2 == 0))
        offset += length
    return runs


def sparse_disk(path: Path, runs: list[Run], seed: int = 1) -> bytes:
    """Write a sparse image made of these runs and return its content."""
    with path.open("wb") as image:
        for run in runs:
            if run.data:
                image.seek(run.offset)
                image.write(random_bytes(run.length, seed + run.offset))
        image.truncate(runs[-1].offset + runs[-1].length)
    return path.read_bytes()
