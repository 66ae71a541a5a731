"""The map of a complete disk that cannot be removed: tried again, and nothing else waits for that."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdserve.common.errors import ImageError
from overlay.formats.flat import open as flat_open
from overlay.formats.flat.create import create, new_header
from overlay.formats.flat.image import FlatImage
from overlay.formats.flat.open import open_flat
from overlay.formats.image import Backing
from overlay.formats.storage import Storage, create_file, sync_directory
from tests.support.disks import MIB

FAILURES = (errno.EROFS, errno.ENOSPC, errno.EIO, errno.EPERM)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty image of one MiB."""
    create(tmp_path / "x", new_header(MIB, (Backing("nbd://h/e", raw=True),)))
    return tmp_path / "x"


def failing(times: int, number: int) -> Callable[[Path, Storage | None], None]:
    """A removal that fails so often before it works."""
    remove, left = flat_open.remove_map, [times]

    def fail(beside: Path, file: Storage | None) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, os.strerror(number), str(beside))
        remove(beside, file)

    return fail


@pytest.mark.parametrize("number", FAILURES)
def test_a_map_that_cannot_be_removed_is_removed_later(
    number: int, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flat_open, "remove_map", failing(4, number))
    beside = path.with_name("x.map")
    image = open_flat(path, writable=True)
    image.fill(0, b"x" * MIB)
    image.finish()
    assert image.complete
    assert image.raw_fd is not None
    assert beside.exists()
    with pytest.raises(ImageError, match="in use"):
        create_file(beside, replace=True)  # or it would be another image's, and removed with it
    image.finish()  # once more
    image.tidy()
    image.tidy()
    assert beside.exists()
    image.tidy()
    assert not beside.exists()
    image.write(0, b"y")
    image.close()
    assert path.read_bytes() == b"y" + b"x" * (MIB - 1)
    said = [record.getMessage() for record in caplog.records if "cannot be removed" in record.getMessage()]
    assert len(said) == 1, "it is said once"
    assert os.strerror(number) in said[0]


@pytest.mark.parametrize("number", FAILURES)
def test_closing_tries_for_the_last_time_and_the_next_who_opens_goes_on(
    number: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_open, "remove_map", failing(4, number))
    beside = path.with_name("x.map")
    with open_flat(path, writable=True) as image:
        image.fill(0, b"x" * MIB)
        image.finish()
    assert beside.exists()
    with open_flat(path, writable=True) as image:
        assert not isinstance(image, FlatImage)
        image.write(0, b"y")
        assert beside.exists()
    with open_flat(path) as image:
        assert image.read(0, 2) == b"yx"
    with open_flat(path, writable=True):
        assert not beside.exists()


def test_one_who_has_removed_the_name_but_not_made_that_durable_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, left = sync_directory, [1]

    def fail(directory: Path) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(directory)

    monkeypatch.setattr(flat_open, "sync_directory", fail)
    with open_flat(path, writable=True) as image:
        image.fill(0, b"x" * MIB)
        image.finish()
        assert not path.with_name("x.map").exists()
        image.tidy()
        assert left[0] == -1, "it was tried again"


def test_a_map_that_an_operator_has_put_in_its_place_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_open, "remove_map", failing(1, errno.EIO))
    beside = path.with_name("x.map")
    with open_flat(path, writable=True) as image:
        image.fill(0, b"x" * MIB)
        image.finish()
        beside.unlink()
        beside.write_bytes(b"another image's")
        image.tidy()
    assert beside.read_bytes() == b"another image's"
