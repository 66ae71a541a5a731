"""Files under images: what reaches the system calls."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from overlay.formats.storage import create_file
from tests.support.disks import KIB, MIB, random_bytes

PWrite = Callable[..., int]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_long_data_is_written_in_short_pieces(
    kind: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long system call costs many times the copying where the host takes free memory back."""
    content, lengths, pwrite = random_bytes(MIB + 5), list[int](), os.pwrite

    def note(fd: int, data: bytes, offset: int) -> int:
        lengths.append(len(data))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", note)
    storage = create_file(tmp_path / "file")
    storage.write(7, kind(content))
    storage.write(0, kind(content[:5]))
    storage.close()
    assert (tmp_path / "file").read_bytes() == content[:5] + bytes(2) + content
    assert max(lengths) <= 256 * KIB
    assert len(lengths) <= 18


def test_data_that_the_kernel_takes_only_in_part_is_written_whole_or_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, pwrite, left = random_bytes(300 * KIB), os.pwrite, [10**9]

    def take_little(fd: int, data: bytes, offset: int) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1000
        return pwrite(fd, memoryview(data)[:1000], offset)

    monkeypatch.setattr(os, "pwrite", take_little)
    storage = create_file(tmp_path / "file")
    storage.write(0, content)
    assert (tmp_path / "file").read_bytes() == content
    left[0] = 150_000
    with pytest.raises(OSError) as failed:
        storage.write(0, content)
    assert failed.value.errno == errno.ENOSPC
    storage.close()
