"""Local ends: what is not taken is kept, whole, in order, and in little more memory than it has bytes."""

from __future__ import annotations

import os
import random
import socket
import tracemalloc

import pytest

from nbdserve.channel.local_ends import LocalEnd, from_socket
from nbdserve.channel.wire.streams import Stream


def stream() -> Stream:
    """Any stream."""
    return Stream(2, 1 << 20, 1 << 20)


@pytest.mark.parametrize("longest", [1, 700, 65_536, 200_000])
def test_what_is_not_taken_at_once_arrives_whole_and_in_order(longest: int) -> None:
    luck = random.Random(longest)
    ours, theirs = socket.socketpair()
    end = from_socket(stream(), ours)
    theirs.setblocking(False)
    sent, received, delivered = bytearray(), bytearray(), 0
    for _ in range(400):
        piece = luck.randbytes(luck.randrange(1, longest + 1))
        sent += piece
        delivered += end.deliver([memoryview(piece)])
        if luck.random() < 0.5:
            received += take(theirs, luck.randrange(1, 100_000))
            delivered += end.flush()
        assert end.held == len(sent) - delivered
    end.end()
    while end.held:
        received += take(theirs, 1 << 20)
        end.flush()
    theirs.setblocking(True)
    while piece := theirs.recv(1 << 20):
        received += piece
    assert received == sent
    end.close()
    theirs.close()


def take(sock: socket.socket, most: int) -> bytes:
    """What is there, up to so much."""
    try:
        return sock.recv(most)
    except BlockingIOError:
        return b""


def test_many_short_pieces_take_little_more_memory_than_their_bytes() -> None:
    ours, theirs = socket.socketpair()
    end = from_socket(stream(), ours)
    end.deliver([memoryview(bytes(4 << 20))])
    before = end.held
    tracemalloc.start()
    for _ in range(200_000):
        end.deliver([memoryview(b"x")])
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert end.held == before + 200_000
    assert used < 2 * 200_000
    end.close()
    theirs.close()


def test_two_pipes_are_an_end_whose_writer_is_closed_behind_what_waits() -> None:
    (reader, to_read), (from_writer, writer) = os.pipe(), os.pipe()
    end = LocalEnd(stream(), reader, writer)
    assert end.read_into([memoryview(bytearray(10))]) is None
    os.write(to_read, b"stream")
    buffer = memoryview(bytearray(10))
    assert end.read_into([buffer]) == 6
    assert bytes(buffer[:6]) == b"stream"
    answers = bytes(1 << 20)
    assert end.deliver([memoryview(answers)]) < len(answers)
    end.end()
    received = b""
    while piece := os.read(from_writer, 1 << 16):
        received += piece
        end.flush()
    assert received == answers
    os.close(to_read)
    assert end.read_into([buffer]) == 0
    end.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)
    os.close(from_writer)
