"""An NBD export as a file, by nbdfuse: to look at it with ordinary tools, or to watch what is done to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import Process, check
from tests.support.servers import fresh_path


@contextmanager
def mounted(uri: str, directory: Path) -> Iterator[Path]:
    """Mount the export and yield the file that it appears as; skips the test where there is no FUSE."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be opened here")
    mount_point = fresh_path(directory, "fuse", "")
    mount_point.mkdir()
    file = mount_point / "disk"
    with Process(["nbdfuse", file, uri], fresh_path(directory, "nbdfuse", ".log")) as process:
        process.wait_for(mount_point.is_mount, f"mounted on {mount_point}")
        try:
            yield file
        finally:
            check("fusermount3", "-u", mount_point)
            assert process.wait() == 0
