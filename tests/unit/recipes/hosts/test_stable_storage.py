"""A slow disk is waited for as long as it writes; one that has stopped is told of."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path
from typing import cast

import pytest

from nbdserve.common import clock
from recipes.errors import MigrationError
from recipes.hosts import stable_storage
from recipes.hosts.host import Host
from recipes.hosts.stable_storage import Written, sync

SILENCE = 0.05


class Disk:
    """Host B, whose sync is over once its disk has been looked at so often."""

    name = "B"

    def __init__(self, looks: int, *, writes: bool) -> None:
        self._looks = looks
        self._writes = writes
        self._written = count()
        self._over = asyncio.Event()
        self.interrupted = False

    async def run(self, command: str, *_: str, limit: float, given: str = "") -> str:
        """Answer as the commands do."""
        if command != "sync":
            self._looks -= 1
            if self._looks <= 0:
                self._over.set()
            return f"{next(self._written) if self._writes else 7}\n"
        try:
            await self._over.wait()
        except asyncio.CancelledError:
            self.interrupted = True
            raise
        return ""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that take no time."""
    monkeypatch.setattr(stable_storage, "LOOK", SILENCE / 5)


def test_a_disk_that_writes_is_waited_for_however_long_it_takes() -> None:
    async def body() -> None:
        disk = Disk(30, writes=True)
        await sync(cast(Host, disk), ["/b.raw"], SILENCE)
        assert not disk.interrupted

    clock.run(body())


def test_a_disk_that_writes_nothing_any_more_is_told_of() -> None:
    async def body() -> None:
        disk = Disk(1 << 30, writes=False)
        with pytest.raises(MigrationError, match=r"^writing /b\.raw to stable storage on B has come"):
            await sync(cast(Host, disk), ["/b.raw"], SILENCE)
        assert disk.interrupted

    clock.run(body())


def test_what_a_file_cannot_be_synced_for_is_said(tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="no such file"):
        clock.run(sync(Host("B"), [str(tmp_path / "no such file")], 60.0))


def test_every_file_has_a_disk_that_can_be_asked(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x")

    async def body() -> None:
        written = Written(Host("B"), [str(tmp_path / "image"), "/dev/shm", "/dev/null"])
        assert await written.has_moved(), "nothing was known before"
        first, *others = written._seen.splitlines()
        assert len(others) == 2
        assert all(line.split()[-1].isdigit() for line in (first, *others))
        lost = Written(Host("B", ("false",)), ["/"])
        assert not await lost.has_moved(), "who does not answer has nothing to tell"

    clock.run(body())
