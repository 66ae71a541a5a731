"""A block device as what lies under an image."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.backends.holes import Mode, try_fallocate
from overlay.formats.device import block_device
from overlay.formats.device.block_device import BlockDevice, open_device
from overlay.formats.device.map_place import default_map, name_of
from tests.support.disks import KIB, MIB, random_disk
from tests.support.loops import loop_device


@pytest.fixture
def device(tmp_path: Path) -> Iterator[BlockDevice]:
    """A device full of random bytes, open for writing."""
    random_disk(tmp_path / "file", MIB)
    with loop_device(tmp_path / "file") as path:
        opened = open_device(path, writable=True)
        try:
            yield opened
        finally:
            opened.close()


@pytest.mark.parametrize("known", [(Mode.PUNCH_HOLE,), (Mode.ZERO_RANGE,), ()])
@pytest.mark.parametrize(("offset", "length"), [(4 * KIB, 300 * KIB), (512, 512), (100, 5000)])
def test_zeros_are_zeros_whatever_the_device_can_do(
    device: BlockDevice,
    monkeypatch: pytest.MonkeyPatch,
    known: tuple[Mode, ...],
    offset: int,
    length: int,
) -> None:
    """A device that was only told to discard need not read as zeros."""

    def able(descriptor: int, mode: Mode, begin: int, count: int) -> bool:
        assert mode & (Mode.PUNCH_HOLE | Mode.ZERO_RANGE)
        return any(mode & each for each in known) and try_fallocate(descriptor, mode, begin, count)

    monkeypatch.setattr(block_device, "try_fallocate", able)
    before = device.read(0, MIB)
    device.zero(offset, length)
    wanted = before[:offset] + bytes(length) + before[offset + length :]
    assert device.read(0, MIB) == wanted
    device.sync()
    assert device.read(0, MIB) == wanted


def test_a_device_has_the_size_that_it_has(device: BlockDevice) -> None:
    assert device.size() == MIB
    assert list(device.data(0, MIB)) == [(0, MIB)]
    with pytest.raises(OSError, match="cannot be cut off") as caught:
        device.truncate(4096)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="No space left"):
        device.write(MIB, b"x")


def test_no_two_devices_have_a_map_of_one_name() -> None:
    names = [name_of(path) for path in ("/dev/a/b", "/dev/a-b", "/dev/a--b", "/dev/a-/b")]
    assert len(set(names)) == len(names)
    assert default_map(Path("/dev/vg-a/lv")).name == "dev-vg--a-lv.map"
