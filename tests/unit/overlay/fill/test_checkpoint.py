"""Copies become durable behind everybody's back; where they cannot, the log says why, once."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from threading import Event

import pytest

from overlay.fill.checkpoint import Checkpoints
from overlay.formats.flat import create as flat
from overlay.formats.image import Backing
from overlay.formats.open import open_image
from tests.support.disks import random_bytes
from tests.support.overlays import make_overlay

MIB = 1 << 20


def test_what_is_local_counts_as_stable_once_it_was_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_overlay(tmp_path / "x", "flat", 4 * MIB, "nbd://h/x")
    with open_image(path, writable=True) as image:
        checkpoints = Checkpoints(image, interval=0.001)
        image.fill(0, random_bytes(MIB))
        assert checkpoints.unstable_bytes == 4 * MIB

        def fails() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

        with monkeypatch.context() as patch:
            patch.setattr(image, "flush", fails)
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                checkpoints.flush()
        assert checkpoints.unstable_bytes == 4 * MIB
        checkpoints.flush()
        assert checkpoints.unstable_bytes == 3 * MIB
        image.fill(MIB, random_bytes(3 * MIB))
        assert (image.complete, checkpoints.unstable_bytes) == (True, 3 * MIB)
        checkpoints.flush()
        assert checkpoints.unstable_bytes == 0


def test_what_comes_during_a_flush_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_overlay(tmp_path / "x", "flat", 4 * MIB, "nbd://h/x")
    with open_image(path, writable=True) as image:
        checkpoints = Checkpoints(image)
        image.fill(0, random_bytes(MIB))
        flush = image.flush

        def late() -> None:
            flush()
            image.fill(MIB, random_bytes(3 * MIB))

        with monkeypatch.context() as patch:
            patch.setattr(image, "flush", late)
            checkpoints.flush()
        assert checkpoints.unstable_bytes == 3 * MIB
        checkpoints.flush()
        assert checkpoints.unstable_bytes == 0


def test_what_was_taken_away_and_has_come_again_is_not_stable_before_the_next_flush(tmp_path: Path) -> None:
    path = make_overlay(tmp_path / "x", "flat", 4 * MIB, "nbd://h/x")
    with open_image(path, writable=True) as image:
        checkpoints = Checkpoints(image)
        image.fill(0, random_bytes(4 * MIB))
        checkpoints.flush()
        image.invalidate([(0, MIB)])
        checkpoints.taken_away(MIB)
        image.fill(0, random_bytes(MIB))
        assert (image.complete, checkpoints.unstable_bytes) == (True, MIB)
        checkpoints.flush()
        assert checkpoints.unstable_bytes == 0


def test_what_an_earlier_process_left_counts_once_it_was_flushed(tmp_path: Path) -> None:
    path = make_overlay(tmp_path / "x", "qed", 4 * MIB, "nbd://h/x")
    with open_image(path, writable=True) as image:
        image.fill(0, random_bytes(4 * MIB))
    with open_image(path, writable=True) as image:
        checkpoints = Checkpoints(image)
        assert checkpoints.unstable_bytes == 4 * MIB
        checkpoints.flush()
        assert checkpoints.unstable_bytes == 0


def test_what_cannot_be_made_durable_is_said_once_with_the_file_and_the_systems_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, failed = tmp_path / "x", Event()
    flat.create(path, flat.new_header(MIB, (Backing("nbd://h/x", raw=True),)))
    with open_image(path, writable=True) as image:
        calls = []

        def tidy() -> None:
            calls.append(1)
            if len(calls) == 3:
                failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(image, "tidy", tidy)
        checkpoints = Checkpoints(image, interval=0.001)
        with caplog.at_level(logging.ERROR):
            checkpoints.start()
            assert failed.wait(30.0)
            checkpoints.close()
    said = f"what was fetched could not be made durable: {path}: No space left on device"
    assert [record.getMessage() for record in caplog.records] == [said]
