"""What is kept of what was fetched, when the image is invalidated in the middle of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.common.uri import parse_uri
from overlay.backing.failover import Sources
from overlay.engine import Overlay
from overlay.fill.claims import Claim
from overlay.formats.flat.create import create, new_header
from overlay.formats.image import Backing, Buffer, Image
from overlay.formats.open import open_image

MIB = 1 << 20
BACKING = Backing("nbd://localhost/disk", raw=True)


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Overlay]:
    """One of 4 MiB, whose source is never connected to."""
    path = tmp_path / "image"
    create(path, new_header(4 * MIB, (BACKING,)))
    image = open_image(path, writable=True)
    found = Overlay(image, Sources([parse_uri(BACKING.name)], image.size))
    yield found
    found.close()


def test_what_is_invalidated_as_soon_as_it_is_stored_proves_nothing_of_the_disk(
    overlay: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest has changed it since: a source that has it as it is now is no other disk."""
    image, samples = overlay.image, overlay.sources.samples
    fill = type(image).fill

    def overtaken(self: Image, offset: int, data: Buffer, asked_at: int | None = None) -> int:
        stored = fill(self, offset, data, asked_at)
        overlay.invalidate([(0, 4 * MIB)])
        return stored

    monkeypatch.setattr(type(image), "fill", overtaken)
    claim = Claim(0, MIB, threading.Event(), image.invalidations)
    assert overlay.fetcher.store(0, memoryview(b"before" * MIB)[:MIB], claim) == MIB
    assert not samples.any_known

    monkeypatch.undo()
    fresh = Claim(0, MIB, threading.Event(), image.invalidations)
    assert overlay.fetcher.store(0, memoryview(b"after!" * MIB)[:MIB], fresh) == MIB
    assert samples.any_known
