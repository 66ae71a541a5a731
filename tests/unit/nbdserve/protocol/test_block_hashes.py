"""Hashes of blocks as runs of a block status, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.protocol.block_hashes import BLOCK, MOST, block_hash, hash_runs, told_hashes
from nbdserve.protocol.extents import Extent, descriptors

DISK = b"".join(bytes([number]) * BLOCK for number in range(8)) + b"tail" * 128


def read_into(offset: int, buffer: memoryview) -> None:
    """Read from the disk."""
    buffer[:] = DISK[offset : offset + len(buffer)]


def told(offset: int, length: int, limit: int = 8192) -> list[bytes]:
    """What a client learns."""
    runs = descriptors(hash_runs(offset, length, len(DISK), read_into), limit=limit, longest=1 << 32)
    return told_hashes([number for run in runs for number in run], length)


@given(st.integers(0, 8), st.integers(1, 9 * BLOCK))
def test_the_hash_of_each_whole_block_is_told(first: int, length: int) -> None:
    offset = min(first * BLOCK, len(DISK) - 512)
    length = min(length, len(DISK) - offset)
    blocks = range(offset, offset + length - BLOCK + 1, BLOCK)
    assert told(offset, length) == [block_hash(DISK[place : place + BLOCK]) for place in blocks]


@given(st.integers(0, len(DISK) - 1), st.integers(1, len(DISK)))
def test_runs_begin_where_they_are_asked_for_and_lie_within_the_disk(offset: int, length: int) -> None:
    length = min(length, len(DISK) - offset)
    runs = list(hash_runs(offset, length, len(DISK), read_into))
    assert runs
    assert all(run.length > 0 for run in runs)
    assert sum(run.length for run in runs) <= length


def test_no_request_has_more_hashed_than_the_most() -> None:
    def zeros(offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))

    assert sum(run.length for run in hash_runs(0, 1 << 30, 1 << 40, zeros)) == MOST


def test_equal_neighbours_that_were_joined_are_told_apart_and_half_a_hash_is_none() -> None:
    hashes = [b"\1\0\0\0" * 8, b"\1\0\0\0" * 3 + b"\2\0\0\0" * 5]
    words = [int.from_bytes(each[i : i + 4], "little") for each in hashes for i in range(0, 32, 4)]
    joined = descriptors((Extent(BLOCK // 8, word) for word in words), limit=99, longest=1 << 32)
    assert len(joined) == 2
    status = [number for run in joined for number in run]
    assert told_hashes(status, 2 * BLOCK) == hashes
    assert told_hashes(status, BLOCK) == hashes[:1]
    assert told_hashes(status[:2], 2 * BLOCK) == hashes[:1]


@pytest.mark.parametrize("status", [[], [BLOCK, 0], [100, 0], [1 << 40, 7]])
def test_what_makes_no_sense_is_no_more_than_was_asked_for(status: list[int]) -> None:
    assert len(told_hashes(status, 2 * BLOCK)) <= 2
