"""The transmission loop without a socket: what is served at once, and what goes the ordinary way."""

from __future__ import annotations

import errno

import pytest

from nbdserve.backends.base import Buffer
from nbdserve.protocol.constants import Command, NbdError
from nbdserve.protocol.offers import Agreement, Mode
from nbdserve.transmission.loop import Transmission
from nbdserve.transmission.traffic import Traffic
from nbdserve.transmission.workers import Crew, Workers
from tests.fuzz.targets import offer_of
from tests.support.memory import MemoryBackend, ScriptedStream
from tests.support.wire import SIMPLE_REPLY, SIMPLE_REPLY_MAGIC, request

SIZE = 1 << 20
BLOCK = 4096
BORDER = SIZE // 2


class HalfAtHand(MemoryBackend):
    """A disk whose second half has to be waited for. It remembers the way by which each request came."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.content[:] = bytes(offset // BLOCK % 251 for offset in range(SIZE))
        self.ways: list[tuple[str, int]] = []

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """What is at hand."""
        at_hand = offset + len(buffer) <= BORDER
        self.ways.append(("read now" if at_hand else "not now", offset))
        if at_hand:
            buffer[:] = self.content[offset : offset + len(buffer)]
        return at_hand

    def write_now(self, offset: int, data: Buffer) -> bool:
        """What is at hand."""
        at_hand = offset + len(data) <= BORDER
        self.ways.append(("write now" if at_hand else "not now", offset))
        if at_hand:
            self.content[offset : offset + len(data)] = data
        return at_hand

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Everything, in its time."""
        self.ways.append(("read", offset))
        super().read_into(offset, buffer)

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Everything, in its time."""
        self.ways.append(("write", offset))
        super().write(offset, data, fua)

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """The first half."""
        return offset + length <= BORDER


def serve(backend: MemoryBackend, script: bytes, piece: int = SIZE) -> tuple[bytes, Traffic]:
    """Feed requests to the loop in pieces; return what it sends, and what it counts."""
    stream, crew, traffic = ScriptedStream(script, piece), Crew(Workers(2), Workers(2)), Traffic()
    agreement = Agreement(offer_of(backend, read_only=False), Mode.SIMPLE, ())
    Transmission(stream, agreement, backend, b"", crew, traffic).run()
    for workers in crew:
        workers.close()
    return bytes(stream.sent), traffic


def answers(sent: bytes, lengths: dict[int, int]) -> dict[int, tuple[int, bytes]]:
    """Error and data by cookie; ``lengths`` says how much data follows the reply to a read."""
    found = {}
    while sent:
        magic, error, cookie = SIMPLE_REPLY.unpack_from(sent)
        assert magic == SIMPLE_REPLY_MAGIC
        length = 0 if error else lengths.get(cookie, 0)
        found[cookie] = (error, sent[SIMPLE_REPLY.size : SIMPLE_REPLY.size + length])
        sent = sent[SIMPLE_REPLY.size + length :]
    return found


@pytest.mark.parametrize("piece", [SIZE, 1000], ids=["at-once", "in-pieces"])
def test_what_is_at_hand_is_served_at_once_and_the_rest_by_workers(piece: int) -> None:
    disk = HalfAtHand()
    before = bytes(disk.content)
    script = b"".join(
        [
            request(Command.READ, BLOCK, BLOCK, cookie=1),
            request(Command.READ, BORDER + BLOCK, BLOCK, cookie=2),
            request(Command.WRITE, 0, data=b"near" * 1024, cookie=3),
            request(Command.WRITE, SIZE - BLOCK, data=b"far!" * 1024, cookie=4),
            request(Command.READ, BORDER - BLOCK, 2 * BLOCK, cookie=5),
            request(Command.READ, 0, BLOCK, cookie=6),
        ]
    )
    sent, traffic = serve(disk, script, piece)
    assert answers(sent, {1: BLOCK, 2: BLOCK, 5: 2 * BLOCK, 6: BLOCK}) == {
        1: (0, before[BLOCK : 2 * BLOCK]),
        2: (0, before[BORDER + BLOCK : BORDER + 2 * BLOCK]),
        3: (0, b""),
        4: (0, b""),
        5: (0, before[BORDER - BLOCK : BORDER + BLOCK]),
        6: (0, b"near" * 1024),
    }
    assert disk.content[SIZE - BLOCK :] == b"far!" * 1024
    at_once = [offset for way, offset in disk.ways if way in ("read now", "write now")]
    assert at_once[0] == BLOCK
    assert sorted(offset for way, offset in disk.ways if way in ("read", "write") and offset >= BORDER) == [
        BORDER + BLOCK,
        SIZE - BLOCK,
    ]
    assert ("read", BORDER - BLOCK) in disk.ways, "a request that only begins at hand has to wait"
    assert (traffic.requests[Command.READ], traffic.requests[Command.WRITE]) == (4, 2)
    assert (traffic.bytes[Command.READ], traffic.bytes[Command.WRITE]) == (5 * BLOCK, 2 * BLOCK)


class Failing(HalfAtHand):
    """A disk that takes nothing."""

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Never."""
        raise OSError(errno.ENOSPC, "full")


def test_the_payload_of_a_write_that_fails_at_once_is_no_request() -> None:
    disk = Failing()
    evil = request(Command.TRIM, 0, SIZE, cookie=66)
    script = b"".join(
        [
            request(Command.WRITE, 0, data=evil * 100, cookie=1),
            request(Command.READ, BLOCK, BLOCK, cookie=2),
        ]
    )
    sent, traffic = serve(disk, script)
    assert answers(sent, {2: BLOCK}) == {
        1: (NbdError.ENOSPC, b""),
        2: (0, bytes(disk.content[BLOCK : 2 * BLOCK])),
    }
    assert traffic.requests[Command.WRITE] == traffic.errors[Command.WRITE] == 1
    assert traffic.requests[Command.TRIM] == 0
