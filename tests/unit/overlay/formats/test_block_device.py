"""A block device as what lies under an image."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.backends.holes import Mode, try_fallocate
from nbdserve.common.errors import ImageError
from overlay.formats.device import block_device
from overlay.formats.device.block_device import BlockDevice, open_device
from overlay.formats.device.map_place import default_map, name_of
from overlay.formats.flat.create import new_header, write_on_device
from overlay.formats.flat.header import Device, Flag
from overlay.formats.flat.log import current_boot
from overlay.formats.flat.open import Parts, assemble
from overlay.formats.image import Backing, Image
from tests.support.disks import KIB, MIB, random_disk
from tests.support.loops import loop_device
from tests.support.simulation import SimulatedDisk


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


def parts_of(device: SimulatedDisk, file: SimulatedDisk) -> Parts:
    """An overlay of 64 KiB that is on a simulated device."""
    return Parts.of_device(device, file, "/dev/x", "/state/x.map")


def opened(parts: Parts, *, writable: bool = True) -> Image:
    """The image that they make."""
    return assemble(parts, writable=writable, boot=current_boot(), remove_map=lambda: None)


@pytest.mark.parametrize("which", ["device", "map"])
def test_after_a_sync_that_failed_the_trailer_or_the_map_says_so(which: str) -> None:
    size = 64 * KIB
    device, file = SimulatedDisk.holding(bytes(size)), SimulatedDisk()
    made = replace(new_header(size, (Backing("nbd://h/x", raw=True),)), device=Device(size, "/dev/x"))
    write_on_device(device, file, made, "/state/x.map", bytes(4 * KIB))
    image = opened(parts_of(device, file))
    assert image.write(size - 8 * KIB, b"x" * 8 * KIB)
    (device if which == "device" else file).failing = True
    with pytest.raises(OSError, match="Input/output error"):
        image.flush()
    with pytest.raises(OSError, match="has failed before"):
        image.write(0, bytes(4 * KIB))
    parts = parts_of(device.reopened(), file.reopened())
    assert parts.trailer is not None
    assert parts.header is not None
    assert (parts.trailer.flags | parts.header.flags) & Flag.FAILED
    assert parts.trailer.map == "/state/x.map"
    with pytest.raises(ImageError, match="writing back to the disk has failed"):
        opened(parts)
    assert opened(parts_of(device.reopened(), file.reopened()), writable=False).backings


@pytest.mark.parametrize("number", [2, 3])
def test_who_comes_later_knows_of_a_sync_that_failed_as_the_page_was_put_back(number: int) -> None:
    """What the guest had written since the last flush may be lost, whatever is in the page cache."""
    size = 64 * KIB
    device, file = SimulatedDisk.holding(bytes(size)), SimulatedDisk()
    made = replace(new_header(size, (Backing("nbd://h/x", raw=True),)), device=Device(size, "/dev/x"))
    write_on_device(device, file, made, "/state/x.map", bytes(4 * KIB))
    image = opened(parts_of(device, file))
    image.fill(0, b"c" * size)
    count = 0

    def write() -> None:
        """As one sync is under way, the first that of the flush before; the next one fails, or the third."""
        nonlocal count
        count += 1
        assert image.write(size - 8 * KIB, b"w" * 8 * KIB)
        device.failing = count == number - 1
        device.during_sync = write

    device.during_sync = write
    with pytest.raises(OSError, match="has failed before"):
        image.finish()
    assert count == number - 1
    parts = parts_of(device.reopened(), file.reopened())
    assert parts.header is not None
    assert parts.header.flags & Flag.FAILED
    with pytest.raises(OSError, match="has failed before"):
        image.write(0, bytes(4 * KIB))


def test_the_page_under_the_trailer_is_put_back_while_a_guest_writes_to_it() -> None:
    size = 64 * KIB
    device, file = SimulatedDisk.holding(bytes(size)), SimulatedDisk()
    made = replace(new_header(size, (Backing("nbd://h/x", raw=True),)), device=Device(size, "/dev/x"))
    write_on_device(device, file, made, "/state/x.map", bytes(4 * KIB))
    image = opened(parts_of(device, file))
    image.fill(0, b"c" * size)
    image.flush()
    number = 0

    def write_again() -> None:
        nonlocal number
        number += 1
        device.during_sync = write_again if number < 3 else None
        if number < 3:
            # Both in the flush before, and as the page is put back and not yet in its place.
            assert image.write(size - 1024, bytes([number]) * 1024)

    device.during_sync = write_again
    image.finish()
    assert number == 3
    assert bytes(device.content) == b"c" * (size - 1024) + bytes([2]) * 1024
    assert image.read(0, size) == bytes(device.content)
    assert image.write(size - 1024, b"n" * 1024)
    assert bytes(device.content[-1024:]) == b"n" * 1024
