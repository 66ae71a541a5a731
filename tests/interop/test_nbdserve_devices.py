"""An image to which somebody else writes past the page cache, as a QEMU with aio=native does.

Of a block device, and of FUSE, Linux keeps a page that was read while it was being written, as it was before.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdserve.client import connect
from nbdserve.common.uri import parse_uri
from nbdserve.protocol.block_hashes import BLOCK, BLOCK_HASHES, block_hash, told_hashes
from nbdserve.protocol.constants import CommandFlags
from tests.support.disks import KIB, MIB, random_disk
from tests.support.fuse import mounted
from tests.support.loops import loop_device
from tests.support.processes import check
from tests.support.servers import nbdserve

SIZE = 4 * MIB + 512
TAIL = SIZE - SIZE % 4096
_LONGEST = 20.0
"""Seconds for which a page that is out of date is waited for."""
_SETUP, _GETEVENTS, _SUBMIT, _DESTROY = 206, 208, 209, 207
_PWRITE = 1


class Request(ctypes.Structure):
    """What io_submit(2) takes: struct iocb."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("eventfd", ctypes.c_uint32),
    )


class Event(ctypes.Structure):
    """What io_getevents(2) returns: struct io_event."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("request", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("more", ctypes.c_int64),
    )


class Guest:
    """Writes to a device past its page cache, and does not wait in the call for that."""

    def __init__(self, device: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._context = ctypes.c_uint64()
        self._call(_SETUP, ctypes.c_long(8), ctypes.byref(self._context))
        self._fd = os.open(device, os.O_RDWR | os.O_DIRECT)
        self._memory = mmap.mmap(-1, BLOCK)

    def write(self, offset: int, data: bytes) -> None:
        """Write, and return when that is acknowledged."""
        self._memory[: len(data)] = data
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        request = Request(opcode=_PWRITE, fd=self._fd, buffer=address, bytes=len(data), offset=offset)
        event, pointer = Event(), ctypes.pointer(request)
        self._call(_SUBMIT, self._context, ctypes.c_long(1), ctypes.byref(pointer))
        one = ctypes.c_long(1)
        self._call(_GETEVENTS, self._context, one, one, ctypes.byref(event), None)
        assert event.result == len(data)

    def close(self) -> None:
        """End it."""
        self._call(_DESTROY, self._context)
        os.close(self._fd)

    def _call(self, *words: object) -> None:
        if self._libc.syscall(*words) < 0:
            raise OSError(ctypes.get_errno(), "a system call for asynchronous input and output")


@contextmanager
def read_all_the_time(device: Path, offset: int, length: int) -> Iterator[None]:
    """Somebody reads a range through the page cache."""
    stopped = threading.Event()

    def read() -> None:
        with device.open("rb", buffering=0) as file:
            while not stopped.is_set():
                os.pread(file.fileno(), length, offset)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        stopped.set()
        reader.join()


def written_behind_the_cache(device: Path, offset: int, length: int) -> bytes:
    """Write until the page cache does not have what was written; return that."""
    guest, number = Guest(device), 0
    deadline = time.monotonic() + _LONGEST
    try:
        with read_all_the_time(device, offset, length), device.open("rb", buffering=0) as file:
            while time.monotonic() < deadline:
                number += 1
                data = bytes([number % 255 + 1]) * length
                guest.write(offset, data)
                if os.pread(file.fileno(), length, offset) != data:
                    return data
    finally:
        guest.close()
    pytest.skip("this kernel drops pages that were read while they were written")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A block device whose size no page divides."""
    random_disk(tmp_path / "disk", SIZE)
    with loop_device(tmp_path / "disk") as device:
        yield device


@pytest.mark.parametrize(("offset", "length"), [(MIB, BLOCK), (TAIL, 512)], ids=["in it", "at its end"])
def test_what_was_written_past_the_page_cache_is_served(
    tmp_path: Path, device: Path, offset: int, length: int
) -> None:
    with nbdserve("-r", "-f", "raw", "--block-hashes", device, directory=tmp_path) as server:
        written = written_behind_the_cache(device, offset, length)
        with connect(parse_uri(server.uri()), contexts=(BLOCK_HASHES,)) as client:
            assert client.read(offset, length) == written
            if length == BLOCK:
                status = client.start_status(offset, BLOCK, BLOCK_HASHES).result()
                assert told_hashes(status, BLOCK) == [block_hash(written)]


def test_what_was_written_past_the_page_cache_of_fuse_is_served(tmp_path: Path) -> None:
    random_disk(tmp_path / "disk", 4 * MIB)
    with (
        nbdserve("-f", "raw", tmp_path / "disk", directory=tmp_path) as below,
        mounted(below.uri(), tmp_path) as file,
        nbdserve("-r", "-f", "raw", file, directory=tmp_path) as server,
    ):
        written = written_behind_the_cache(file, MIB, BLOCK)
        with connect(parse_uri(server.uri())) as client:
            assert client.read(MIB, BLOCK) == written


def test_a_device_is_read_to_its_last_sector(tmp_path: Path, device: Path) -> None:
    content = (tmp_path / "disk").read_bytes()
    with (
        nbdserve("-r", "-f", "raw", device, directory=tmp_path) as server,
        connect(parse_uri(server.uri())) as client,
    ):
        for offset, length in ((0, SIZE), (TAIL - 4 * KIB, 4 * KIB + 512), (SIZE - 1, 1), (TAIL - 1, 2)):
            assert client.read(offset, length) == content[offset : offset + length]


@pytest.mark.parametrize("options", [["-r"], ["--cache=none"]], ids=str)
def test_a_device_whose_sectors_are_longer_than_a_page_is_served(tmp_path: Path, options: list[str]) -> None:
    content = random_disk(tmp_path / "disk", 4 * MIB)
    with (
        loop_device(tmp_path / "disk", "--sector-size", "16384") as device,
        nbdserve("-f", "raw", *options, device, directory=tmp_path) as server,
        connect(parse_uri(server.uri())) as client,
    ):
        for offset, length in ((0, 4 * MIB), (4096, 4096), (16384 - 1, 2), (4 * MIB - 512, 512)):
            assert client.read(offset, length) == content[offset : offset + length]
        if "-r" not in options:
            client.start_write(16384 - 512, bytes(1024), CommandFlags(0)).result()
            assert (
                client.read(0, 32768) == content[: 16384 - 512] + bytes(1024) + content[16384 + 512 : 32768]
            )


def test_the_files_of_a_qcow2_disk_on_a_device_are_read_past_the_page_cache(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(16 * MIB))
    with loop_device(tmp_path / "disk") as device:
        check("qemu-img", "create", "-q", "-f", "qcow2", device, "8M")
        with nbdserve("-r", "-f", "qcow2", device, directory=tmp_path) as server:
            lines = [each for each in command_lines() if "qemu-nbd" in each[0] and str(device) in each]
            assert any("--cache=none" in each for each in lines), (server, lines)


def command_lines() -> list[list[str]]:
    """Return those of all processes."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(place.read_text().split("\0"))
        except (OSError, UnicodeDecodeError):
            continue
    return [each for each in found if each[0]]
