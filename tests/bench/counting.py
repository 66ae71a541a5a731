"""A client that does next to nothing but count replies, for servers that are faster than fio.

    python -m tests.bench.counting ADDRESS EXPORT ACCESS BLOCK DEPTH SECONDS

Its requests are prepared before the clock starts, and are sent as soon as replies make room for them, all
that fit with one system call. Of each reply it looks at what tells a good one of the expected length from
anything else, and never at its data. Prints a ClientRun as JSON.
"""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.bench.rows import ClientRun, Row
from tests.support import wire
from tests.support.processes import check
from tests.support.servers import Address, TcpAddress, UnixAddress
from tests.support.wire import Command, Option, Reply, Wire

PREPARED = 64 << 20
"""Bytes of requests that are prepared at most; they are sent again and again."""
MOST_PREPARED = 1 << 16
"""Requests, likewise."""


def run_counting(address: Address, export: str, row: Row, seconds: float) -> ClientRun:
    """Run the row's requests, on one connection, in a process of their own."""
    where = str(address.path) if isinstance(address, UnixAddress) else f"{address.host}:{address.port}"
    arguments = [where, export, row.access, str(row.block), str(row.depth), str(seconds)]
    output = check(sys.executable, "-m", "tests.bench.counting", *arguments, seconds=seconds + 60)
    return ClientRun(**json.loads(output))


def main(arguments: Sequence[str]) -> None:
    """Measure."""
    where, export, access, block, depth, seconds = arguments
    host, _, port = where.rpartition(":")
    address = TcpAddress(host, int(port)) if port.isdigit() else UnixAddress(Path(where))
    with Wire(address) as connection:
        if connection.socket.family != socket.AF_UNIX:
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        size = begin(connection, export)
        requests = prepare(access, int(block), size)
        run = count(connection, requests, int(block), int(depth), float(seconds), "write" in access)
    print(json.dumps(asdict(run)))


def begin(connection: Wire, export: str) -> int:
    """Haggle, with structured replies where the server has them; return the export's size in bytes."""
    connection.greet()
    connection.haggle(Option.STRUCTURED_REPLY)
    replies = connection.haggle(Option.GO, wire.export_query(export))
    assert replies[-1].kind == Reply.ACK
    [size] = [
        struct.unpack(">HQH", reply.data)[1]
        for reply in replies
        if reply.kind == Reply.INFO and reply.data[:2] == b"\0\0"
    ]
    return int(size)


def prepare(access: str, block: int, size: int) -> list[bytes]:
    """Requests for blocks all over the disk, in a random order for ``randread`` and ``randwrite``."""
    payload = os.urandom(block) if "write" in access else b""
    blocks = size // block
    total = min(MOST_PREPARED, PREPARED // len(payload) if payload else MOST_PREPARED)
    chance = random.Random(0)
    numbers = (chance.randrange(blocks) if access.startswith("rand") else i % blocks for i in range(total))
    command = Command.WRITE if payload else Command.READ
    return [wire.request(command, number * block, block, data=payload) for number in numbers]


def reply_length(connection: Wire, request: bytes, block: int) -> tuple[int, dict[int, int]]:
    """Ask once: how long a reply is, and which of its bytes, by their place, a good one must have."""
    connection.send(request)
    magic = connection.receive(4)
    if magic == wire.SIMPLE_REPLY_MAGIC.to_bytes(4, "big"):
        rest = connection.receive(wire.SIMPLE_REPLY.size - 4)
        assert not any(rest[:4]), "an error"
        connection.receive(block)
        return wire.SIMPLE_REPLY.size + block, {3: magic[3], 6: 0, 7: 0}
    rest = connection.receive(wire.CHUNK.size - 4)
    _, flags, kind, _, length = wire.CHUNK.unpack(magic + rest)
    assert (flags, kind) in ((1, 0), (1, 1)), "a reply in several chunks, or an error"
    connection.receive(length)
    return wire.CHUNK.size + length, {3: magic[3], 5: flags, 6: 0, 7: kind}


def count(
    connection: Wire, requests: list[bytes], block: int, depth: int, seconds: float, writes: bool
) -> ClientRun:
    """Keep so many requests in flight for so long, and count what is answered."""
    length, marks = reply_length(connection, requests[0], 0 if writes else block)
    one, total = len(requests[0]), len(requests)
    stream = memoryview(b"".join(requests))
    # Room for more than can be in flight.
    buffer = bytearray((depth + 1) * length)
    view, receive, send = memoryview(buffer), connection.socket.recv_into, connection.socket.sendall
    connection.socket.settimeout(None)
    position = have = done = 0
    began, processor = time.perf_counter(), time.process_time()
    end, more = began + seconds, depth
    while True:
        while more:
            part = min(more, total - position)
            send(stream[position * one : (position + part) * one])
            position, more = (position + part) % total, more - part
        received = receive(view[have:])
        assert received, "the server has closed the connection"
        have += received
        whole = have // length
        if not whole:
            continue
        for place, mark in marks.items():
            assert buffer[place : whole * length : length].count(mark) == whole, "not a good reply"
        done, have = done + whole, have - whole * length
        buffer[:have] = buffer[whole * length : whole * length + have]
        more = whole
        if time.perf_counter() >= end:
            break
    took, processor = time.perf_counter() - began, time.process_time() - processor
    connection.receive((depth - whole) * length - have)
    connection.send(wire.request(Command.DISC))
    return ClientRun(done, done * block, took, processor / took, processor)


if __name__ == "__main__":
    main(sys.argv[1:])
