"""A difference that was found stays one until it was looked at again, whatever is lost in between."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import pytest

from nbdserve.client import Client
from nbdserve.common.uri import parse_uri
from nbdserve.protocol.block_hashes import BLOCK, hash_runs
from overlay.backing.connections import Session
from overlay.backing.failover import Sources
from overlay.fill import verifying
from overlay.fill.verifying import DifferenceError, Verifying
from overlay.formats.flat.create import create, new_header
from overlay.formats.image import Backing, Image
from overlay.formats.open import open_image

BLOCKS = 8
SIZE = BLOCKS * BLOCK
BACKING = Backing("nbd://localhost/disk", raw=True)


class Source:
    """A disk of zeros whose hashes are asked for; each request in ``lost`` loses its connection."""

    size = SIZE

    def __init__(self, *lost: int) -> None:
        self.asked = 0
        self._lost = lost

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Hang up."""

    def start_status(self, offset: int, length: int, context: str) -> Future[list[int]]:
        """Tell the hashes of a range, or be lost."""
        self.asked += 1
        told: Future[list[int]] = Future()
        if self.asked in self._lost:
            told.set_exception(OSError(errno.ENOTCONN, "the connection is lost"))
            return told

        def read_into(offset: int, buffer: memoryview) -> None:
            buffer[:] = bytes(len(buffer))

        runs = hash_runs(offset, length, SIZE, read_into)
        told.set_result([number for run in runs for number in (run.length, run.flags)])
        return told


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    """One in which everything is, and three blocks are not what the source has."""
    path = tmp_path / "image"
    create(path, new_header(SIZE, (BACKING,)))
    with open_image(path, writable=True) as image:
        content = bytearray(SIZE)
        for number in (1, 4, 6):
            content[number * BLOCK] = 1
        image.fill(0, content)
        yield image


def compare(image: Image, source: Source, monkeypatch: pytest.MonkeyPatch) -> Verifying:
    """Compare them, with no pause between two connections."""

    def connected(session: Session, sources: Sources, pause_point: Callable[[], None]) -> Client:
        return cast(Client, source)

    monkeypatch.setattr(verifying, "connected", connected)
    monkeypatch.setattr(verifying, "_LONGEST", BLOCK)
    comparing = Verifying(image, Sources([parse_uri(BACKING.name)], SIZE))
    with pytest.raises(DifferenceError, match=r"3 blocks .* the first at 65536"):
        comparing.run(lambda: cast(Session, None), lambda seconds: None)
    return comparing


@pytest.mark.parametrize("lost", range(1, BLOCKS + 4))
def test_a_connection_that_is_lost_takes_no_difference_with_it(
    image: Image, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    source = Source(lost)
    comparing = compare(image, source, monkeypatch)
    assert source.asked > BLOCKS, "the differences were looked at again"
    assert comparing.compared == SIZE - 3 * BLOCK
