"""A seed is believed no further than what was read of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from overlay.backing.seed import Seed

MIB = 1 << 20


@pytest.fixture
def seed(tmp_path: Path) -> Seed:
    """One of 4 MiB, of which only the second and the last have data."""
    path = tmp_path / "seed"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
        for place in (MIB, 3 * MIB):
            file.seek(place)
            file.write(b"x" * MIB)
    return Seed(path, tmp_path / "image")


def test_holes_are_left_out(seed: Seed) -> None:
    assert list(seed.data(0, 4 * MIB)) == [(MIB, 2 * MIB), (3 * MIB, 4 * MIB)]
    assert list(seed.data(MIB + 4096, MIB + 8192)) == [(MIB + 4096, MIB + 8192)]
    seed.close()


def test_what_it_ends_within_it_does_not_have(seed: Seed) -> None:
    assert seed.read(3 * MIB, MIB) == b"x" * MIB
    assert seed.read(3 * MIB + 1, MIB) is None
    os.truncate(seed.path, MIB)
    assert seed.read(3 * MIB, MIB) is None
    seed.close()


def test_what_cannot_be_read_it_does_not_have_and_that_is_said_once(
    seed: Seed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.pread

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        if offset <= MIB < offset + length:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, length, offset)

    monkeypatch.setattr("overlay.backing.seed.os.pread", pread)
    assert seed.read(MIB, 4096) is None
    assert seed.read(MIB, 8192) is None
    assert seed.read(MIB + 4096, 4096) == b"x" * 4096
    assert len(caplog.records) == 1
    seed.close()
