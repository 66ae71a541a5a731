"""How a migration went over time: a small file in its directory, for the report.

A line for each sample, the oldest first. Where there are too many, every second one goes, and from then on
they are taken half as often: the file stays small, however long the migration takes. It may be lost.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from recipes.migrate.journal import SAMPLES, open_regular

MOST = 2000
"""Samples, of some hundred bytes each."""

OFTEN = 1.0
"""Seconds between two, at first."""

_LONGEST = 1 << 20
"""Bytes that are read of a file."""


@dataclass(frozen=True)
class Sample:
    """One instant.

    time     in seconds since the epoch
    done     bytes of the disks that are on B
    total    bytes of the disks
    rate     bytes per second of late
    misses   requests of the guest that have waited for A, until now; -1 where nobody counts them
    waited   seconds for which these have waited, together
    """

    time: float
    done: int
    total: int
    rate: float
    misses: int = -1
    waited: float = 0.0


def load(directory: Path) -> list[Sample]:
    """Return the samples of the migration in this directory, as far as they can be read."""
    found = []
    with suppress(OSError), os.fdopen(open_regular(directory / SAMPLES, os.O_RDONLY), "rb") as file:
        for line in file.read(_LONGEST).splitlines():
            with suppress(ValueError, TypeError, RecursionError):
                values = json.loads(line)
                if len(values) == len(fields(Sample)) and all(
                    type(value) in (int, float) and math.isfinite(value) for value in values
                ):
                    found.append(Sample(*values))
    return found


class Samples:
    """Those of a running migration, which goes on with what an earlier command has left."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / SAMPLES
        self._kept = load(directory)
        self._every = OFTEN
        while len(self._kept) > 1 and self._span / self._every >= MOST:
            self._every *= 2

    @property
    def _span(self) -> float:
        return self._kept[-1].time - self._kept[0].time

    def note(self, sample: Sample) -> None:
        """Keep this one, unless the last one is younger than what lies between two; never fails."""
        if self._kept and 0 <= sample.time - self._kept[-1].time < self._every:
            return
        self._kept.append(sample)
        if len(self._kept) > MOST:
            self._kept = self._kept[::2]
            self._every *= 2
            self._write(self._kept, os.O_TRUNC)
        else:
            self._write([sample], os.O_APPEND)

    def _write(self, samples: Sequence[Sample], how: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | how
        with suppress(OSError), os.fdopen(open_regular(self._path, flags), "w", encoding="ascii") as file:
            file.writelines(f"{json.dumps(astuple(sample), separators=(',', ':'))}\n" for sample in samples)
