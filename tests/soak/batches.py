"""Requests that are sent in one go, and the bytes that answer them: the same ones every time.

The first answers to a batch are taken apart and checked, request by request. Whoever sends the same batch
again needs only compare, so that a few threads of Python keep a server busy.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from tests.support.disks import KIB, MIB
from tests.support.wire import Command, Flag, Kind, Wire, extended_request, request

REGION = 8 * MIB
"""Bytes of the export that belong to one client alone: 4 MiB to read, 2 to write, 2 to zero and trim."""
_WRITTEN, _ZEROED = 4 * MIB, 6 * MIB
_SMALL = (512, 512, 512, 1000, 4096)
_EINVAL, _ENOSPC = 22, 28


class Mode(Enum):
    """What a client agrees on while it haggles."""

    SIMPLE = auto()
    STRUCTURED = auto()
    EXTENDED = auto()


@dataclass(frozen=True)
class Asked:
    """One request. ``error`` is how it must be answered; ``length`` is what a read returns, in bytes."""

    command: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    data: bytes = b""
    error: int = 0


@dataclass
class Batch:
    """Requests that go out with one send; ``answer`` is all that comes back, once it has been checked."""

    mode: Mode
    asked: Sequence[Asked]
    sent: bytes = field(init=False)
    answer: bytes = b""

    def __post_init__(self) -> None:
        framed = extended_request if self.mode is Mode.EXTENDED else request
        self.sent = b"".join(
            framed(one.command, one.offset, one.length, cookie=cookie, flags=one.flags, data=one.data)
            for cookie, one in enumerate(self.asked)
        )

    def learn(self, wire: RecordingWire) -> None:
        """Send it and check each reply by itself; then the answer is known.

        It is sent twice, as the first time it changes what it reads.
        """
        for _ in range(2):
            wire.send(self.sent)
            wire.recorded.clear()
            for cookie, one in enumerate(self.asked):
                self._check(wire, cookie, one)
        self.answer = bytes(wire.recorded)

    def repeat(self, wire: Wire, buffer: bytearray) -> None:
        """Send it again and compare; AssertionError when one byte differs. ``buffer`` is scratch space."""
        wire.socket.sendall(self.sent)
        expected, received = len(self.answer), 0
        view = memoryview(buffer)[:expected]
        while received < expected:
            count = wire.socket.recv_into(view[received:])
            if not count:
                raise EOFError(f"the server closed after {received} of {expected} bytes")
            received += count
        assert view == self.answer, "a reply differs from the one that the same request had before"

    def _check(self, wire: RecordingWire, cookie: int, one: Asked) -> None:
        if self.mode is Mode.SIMPLE:
            reply = wire.simple_reply()
            assert (reply.cookie, reply.error) == (cookie, one.error), one
            if one.command == Command.READ and not reply.error:
                wire.receive(one.length)
            return
        chunks = wire.chunks()
        assert all(chunk.cookie == cookie for chunk in chunks), one
        assert chunks[-1].error == one.error, one
        if one.command == Command.READ and not one.error:
            holes = sum(
                int.from_bytes(chunk.payload[8:], "big") for chunk in chunks if chunk.kind == Kind.OFFSET_HOLE
            )
            data = sum(len(chunk.payload) - 8 for chunk in chunks if chunk.kind == Kind.OFFSET_DATA)
            assert holes + data == one.length, one


class RecordingWire(Wire):
    """Remembers what it received."""

    recorded = bytearray()

    def receive(self, count: int) -> bytes:
        """Receive exactly so many bytes."""
        received = super().receive(count)
        self.recorded += received
        return received


def batches(mode: Mode, region: int, size: int) -> list[Batch]:
    """Everything that a client of the region does, over and over, to an export of ``size`` bytes."""
    chance = random.Random(region)
    return [
        *(Batch(mode, _small(chance, region)) for _ in range(6)),
        Batch(mode, _odd(mode, region, size)),
        Batch(mode, [Asked(Command.READ, region + 4097, 700 * KIB), Asked(Command.FLUSH)]),
        Batch(mode, [Asked(Command.WRITE, region + _WRITTEN + MIB, data=chance.randbytes(700 * KIB))]),
    ]


def _small(chance: random.Random, region: int) -> list[Asked]:
    """Short reads and writes, a few hundred; little enough that all replies fit into the socket's buffers."""
    found = []
    for _ in range(240):
        length = chance.choice(_SMALL)
        if chance.random() < 0.75:
            found.append(Asked(Command.READ, region + chance.randrange(_WRITTEN - length), length))
        else:
            offset = region + _WRITTEN + chance.randrange(MIB - length)
            found.append(Asked(Command.WRITE, offset, data=chance.randbytes(length // 4)))
    return found


def _odd(mode: Mode, region: int, size: int) -> list[Asked]:
    """Every other command, and what is refused. The flush comes last, as it is answered out of turn."""
    zeroed = region + _ZEROED
    found = [
        Asked(Command.WRITE_ZEROES, zeroed, 64 * KIB),
        Asked(Command.WRITE_ZEROES, zeroed + 128 * KIB, 5000, flags=Flag.NO_HOLE),
        Asked(Command.TRIM, zeroed + MIB, 64 * KIB),
        Asked(Command.CACHE, region, MIB),
        Asked(Command.WRITE, region + _WRITTEN, flags=Flag.FUA, data=b"durable"),
        Asked(Command.READ, region, 0),
        Asked(Command.READ, zeroed, 512 * KIB),
        Asked(Command.READ, size - 1, 2, error=_EINVAL),
        Asked(Command.READ, 2**64 - 1, 2, error=_EINVAL),
        Asked(Command.WRITE, size, data=bytes(3000), error=_ENOSPC),
        Asked(Command.TRIM, size, 1, error=_EINVAL),
        Asked(Command.WRITE_ZEROES, size, 1, error=_ENOSPC),
        Asked(Command.READ, region, 512, flags=1 << 14, error=_EINVAL),
        Asked(Command.RESIZE, 0, 0, error=_EINVAL),
        Asked(99, region, 512, error=_EINVAL),
    ]
    if mode is Mode.SIMPLE:
        found.append(Asked(Command.BLOCK_STATUS, region, MIB, error=_EINVAL))
    else:
        found.append(Asked(Command.READ, region, 4096, flags=Flag.DF))
        found += [Asked(Command.BLOCK_STATUS, region, MIB, flags=flags) for flags in (0, Flag.REQ_ONE)]
    return [*found, Asked(Command.FLUSH)]
