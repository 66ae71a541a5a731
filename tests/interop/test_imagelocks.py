"""Our image locks and QEMU's keep each other out exactly as two QEMUs would."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.backends.imagelocks import EXCLUSIVE, READER, WRITER, ImageLocks, Permission
from nbdserve.common.errors import ImageError
from tests.support.holding import qemu_holding

NOTHING = Permission.NONE


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qed"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qed", path, "1M"], timeout=240, check=True)
    return path


def qemu_io_opens(image: Path, *options: str) -> bool:
    argv = ["qemu-io", "-f", "qed", *options, "-c", "length", str(image)]
    return subprocess.run(argv, capture_output=True, timeout=240, check=False).returncode == 0


@contextmanager
def held(image: Path, used: Permission, unshared: Permission) -> Iterator[None]:
    fd = os.open(image, os.O_RDWR)
    try:
        ImageLocks(fd, str(image)).hold(used, unshared)
        yield
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("used", "unshared", "reads", "writes"),
    [
        (WRITER, EXCLUSIVE, False, False),
        (READER, EXCLUSIVE, True, False),
        (NOTHING, EXCLUSIVE, True, False),
        (READER, NOTHING, True, True),
    ],
)
def test_qemu_respects_our_locks(
    image: Path, used: Permission, unshared: Permission, reads: bool, writes: bool
) -> None:
    with held(image, used, unshared):
        assert qemu_io_opens(image, "-r") is reads
        assert qemu_io_opens(image) is writes
    assert qemu_io_opens(image)


def test_we_respect_the_locks_of_a_qemu_that_writes(image: Path) -> None:
    with qemu_holding(image), held(image, READER, NOTHING):
        for used in (WRITER, READER, NOTHING):
            with pytest.raises(ImageError, match="in use"), held(image, used, EXCLUSIVE):
                pytest.fail("locked an image that a QEMU writes to")


def test_we_respect_the_locks_of_a_qemu_that_reads(image: Path) -> None:
    with (
        qemu_holding(image, "-r"),
        held(image, READER, EXCLUSIVE),
        pytest.raises(ImageError, match="in use"),
        held(image, WRITER, EXCLUSIVE),
    ):
        pytest.fail("locked an image for writing that a QEMU reads")
