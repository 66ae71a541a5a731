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

MIB = 1 << 20


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
