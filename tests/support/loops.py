"""Images as block devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.exports.moved_images import find_marker
from tests.support.processes import check, run


@contextmanager
def loop_device(image: Path, *options: str) -> Iterator[Path]:
    """The image as a block device, with more options of losetup; skips the test where there can be none."""
    attached = run("losetup", "--find", "--show", *options, image)
    if attached.returncode:
        pytest.skip(f"no loop device here: {attached.stderr.strip()}")
    device = Path(attached.stdout.strip())
    # The next image that is this device has nothing to do with a guest that has moved from this one.
    forget_guest(device)
    try:
        yield device
    finally:
        forget_guest(device)
        check("losetup", "--detach", device)


def forget_guest(device: Path) -> None:
    """Remove the marker of a guest that has moved from a device."""
    if marker := find_marker(device):
        marker.unlink(missing_ok=True)
