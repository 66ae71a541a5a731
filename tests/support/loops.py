"""Images as block devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import check, run


@contextmanager
def loop_device(image: Path, *options: str) -> Iterator[Path]:
    """The image as a block device, with more options of losetup; skips the test where there can be none."""
    attached = run("losetup", "--find", "--show", *options, image)
    if attached.returncode:
        pytest.skip(f"no loop device here: {attached.stderr.strip()}")
    device = attached.stdout.strip()
    try:
        yield Path(device)
    finally:
        check("losetup", "--detach", device)
