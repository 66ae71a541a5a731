"""docs/flat-format.md is a specification: a reader written from that page alone agrees with the package."""

from __future__ import annotations

import os
import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from overlay.formats.flat.create import create, new_header, write_on_device
from overlay.formats.flat.header import Device
from overlay.formats.flat.image import FlatImage
from overlay.formats.flat.open import open_flat
from overlay.formats.image import Backing, State
from overlay.formats.storage import FileStorage

MIB = 1 << 20
GRAIN = 4096
CHUNK = 32768


class Page:
    """An image as the page has it; ``present`` and ``written`` are one number each, a bit for each grain."""

    def __init__(self, path: Path, boot: bytes) -> None:
        data, file = path.read_bytes(), Path(f"{path}.map").read_bytes()
        trailer = data[-4096:]
        magic, version, flags, self.size, self.uuid = struct.unpack_from("<8sIIQ16s", trailer)
        assert (magic, version, flags) == (b"NBDFDAT\0", 1, 0)
        assert struct.unpack_from("<I", trailer, 40)[0] == zlib.crc32(trailer[:40])
        assert not any(trailer[44:])
        self.grains = -(-self.size // GRAIN)
        assert len(data) == self.grains * GRAIN + 4096
        (
            magic,
            version,
            features,
            size,
            grain,
            self.flags,
            uuid,
            self.boot,
            *self.generations,
            length,
            crc,
        ) = struct.unpack_from("<8sIIQII16s16sQQII", file)
        assert (magic, version, features, size, grain) == (b"NBDFMAP\0", 1, 0, self.size, GRAIN)
        assert uuid == self.uuid
        assert struct.unpack_from("<I", file, 88)[0] == zlib.crc32(file[:88])
        names = file[4096 : 4096 + length]
        assert zlib.crc32(names) == crc
        self.backings = [name.decode() for name in names.split(b"\0")[:-1]]
        self.present = self.written = 0
        self._read_bitmaps(file)
        if self.boot == boot:
            self._read_log(file)

    def _read_bitmaps(self, file: bytes) -> None:
        chunks = -(-self.grains // CHUNK)
        bitmaps = -(-(2129920 + 4 * chunks) // 4096) * 4096
        assert len(file) >= bitmaps + 8192 * chunks
        for chunk in range(chunks):
            counts = struct.unpack_from("<HH", file, 2129920 + 4 * chunk)
            full = min(CHUNK, self.grains - chunk * CHUNK)
            maps = []
            for number, count in enumerate(counts):
                at = bitmaps + 8192 * chunk + 4096 * number
                value = int.from_bytes(file[at : at + 4096], "little")
                maps.append({0: 0, full: (1 << full) - 1}.get(count, value & ((1 << full) - 1)))
            self.present |= maps[0] << chunk * CHUNK
            self.written |= (maps[0] & maps[1]) << chunk * CHUNK

    def _read_log(self, file: bytes) -> None:
        for half, generation in enumerate(self.generations):
            at = 32768 + half * MIB
            for record in (file[place : place + 16] for place in range(at, at + MIB, 16)):
                if int.from_bytes(record[10:], "little") != generation:
                    break
                bits = (1 << int.from_bytes(record[6:10], "little")) - 1
                self.present |= bits << int.from_bytes(record[:6], "little")
                self.written |= bits << int.from_bytes(record[:6], "little")

    def state_of(self, grain: int) -> tuple[bool, bool]:
        """Whether a grain is present, and whether the guest wrote it."""
        return bool(self.present >> grain & 1), bool(self.written >> grain & 1)


def boot_id() -> bytes:
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))


def as_the_package_sees_it(image: FlatImage) -> list[tuple[bool, bool]]:
    found: list[tuple[bool, bool]] = []
    for run in image.runs(0, image.size):
        found += [(run.state is not State.ABSENT, run.written)] * -(-run.length // GRAIN)
    return found


@pytest.mark.parametrize("size", [512, 5 * MIB + 512, 129 * MIB + 1536])
@pytest.mark.parametrize("end", ["closed", "killed", "flushed and killed"])
def test_a_reader_written_from_the_page_sees_what_the_package_sees(
    tmp_path: Path, size: int, end: str
) -> None:
    path = tmp_path / "disk"
    uris = ("nbd://192.0.2.1/vm", "nbd+unix:///vm?socket=/run/s")
    create(path, new_header(size, tuple(Backing(uri, raw=True) for uri in uris)))
    image = open_flat(path, writable=True)
    assert isinstance(image, FlatImage)
    chance = random.Random(size)
    for number in range(60):
        grain = chance.randrange(-(-size // GRAIN))
        length = min(chance.choice([1, 3, 700]) * GRAIN, size - grain * GRAIN)
        data = chance.randbytes(length)
        if number % 3:
            image.fill(grain * GRAIN, data)
        else:
            assert image.write(grain * GRAIN, data)
            image.commit()
        if number == 30 and end != "closed":
            image.flush()
    expected = as_the_package_sees_it(image)
    if end == "closed":
        image.close()
    else:
        if end.startswith("flushed"):
            image.flush()
        image._data.close()
        image._map.close()
    page = Page(path, boot_id())
    assert page.backings == list(uris)
    assert bool(page.flags & 1) == (end == "closed")
    for grain, (present, written) in enumerate(expected):
        # What was copied since the last flush is lost with the process, and fetched again.
        if end == "killed" and present and not written:
            continue
        assert page.state_of(grain) == (present, written), grain


@pytest.mark.parametrize("room", [0, 1536, 5 * MIB])
def test_a_reader_written_from_the_page_finds_what_the_trailer_on_a_device_lies_over(
    tmp_path: Path, room: int
) -> None:
    size = 5 * MIB + 512
    before = random.Random(room).randbytes(size + room)
    (tmp_path / "device").write_bytes(before)
    (tmp_path / "map").touch()
    device = FileStorage(os.open(tmp_path / "device", os.O_RDWR), tmp_path / "device")
    file = FileStorage(os.open(tmp_path / "map", os.O_RDWR), tmp_path / "map")
    made = replace(new_header(size, (Backing("nbd://h/x", raw=True),)), device=Device(size + room, "/dev/x"))
    write_on_device(device, file, made, "/state/x.map", before[-4096:])
    device.close()
    file.close()
    data, found = (tmp_path / "device").read_bytes(), (tmp_path / "map").read_bytes()
    assert data[:-4096] == before[:-4096]
    trailer = data[-4096:]
    assert struct.unpack_from("<8sIIQ16s", trailer) == (b"NBDFDAT\0", 1, 8, size, made.uuid.bytes)
    assert struct.unpack_from("<I", trailer, 40)[0] == zlib.crc32(trailer[:40])
    assert struct.unpack_from("<I", trailer, 44)[0] == zlib.crc32(trailer[48:512])
    assert trailer[48:512].rstrip(b"\0") == b"/state/x.map"
    assert struct.unpack_from("<I", found, 12)[0] == 1
    assert struct.unpack_from("<I", found, 88)[0] == zlib.crc32(found[:88])
    assert struct.unpack_from("<I", found, 92)[0] == zlib.crc32(found[96:512])
    assert struct.unpack_from("<Q", found, 96)[0] == size + room
    assert found[104:512].rstrip(b"\0") == b"/dev/x"
    bitmaps = -(-(2129920 + 4) // 4096) * 4096
    assert found[bitmaps + 8192 :] == before[-4096:]
