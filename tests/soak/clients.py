"""Clients that come, work and go: most in good order, some as clients do that crash."""

from __future__ import annotations

import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.soak.batches import REGION, Asked, Batch, Mode, RecordingWire, batches
from tests.support.disks import KIB, MIB
from tests.support.servers import Address
from tests.support.tls import encrypt
from tests.support.wire import (
    REQUEST,
    REQUEST_MAGIC,
    Command,
    Option,
    Reply,
    Wire,
    export_query,
    meta_query,
    option,
    request,
)

_RESET = struct.pack("ii", 1, 0)  # struct linger: on, 0 seconds: closing sends a reset


class Quota:
    """How many requests are still to be made, by all clients together."""

    def __init__(self, requests: int) -> None:
        self._left = requests
        self._lock = threading.Lock()
        self.answered = 0
        """Requests whose answers have come, and were right."""

    @property
    def open(self) -> bool:
        """Whether more are to be made."""
        return self._left > 0

    def take(self, requests: int) -> None:
        """So many have been answered."""
        with self._lock:
            self._left -= requests
            self.answered += requests


@dataclass
class Worker:
    """A client with a region of its own in an export, which it keeps over all its connections."""

    address: Address
    mode: Mode
    region: int
    size: int
    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        self._batches = batches(self.mode, self.region, self.size)
        self._chance = random.Random(self.region)
        self._buffer = bytearray(2 * MIB)
        self._known = False

    def work(self, quota: Quota) -> None:
        """Connect, work for a while and leave, again and again, until the quota is used up."""
        while quota.open:
            with self._connected() as wire:
                if not self._known:
                    for batch in self._batches:
                        batch.learn(wire)
                    self._known = True
                for _ in range(self._chance.choice((1, 10, 100, 1000))):
                    batch = self._chance.choice(self._batches)
                    batch.repeat(wire, self._buffer)
                    quota.take(len(batch.asked))
                    if not quota.open:
                        break
                self._leave(wire)

    def _connected(self) -> RecordingWire:
        wire = RecordingWire(self.address, 60)
        wire.recorded = bytearray()
        if self.tls is not None:
            wire.greet()
            assert wire.haggle(Option.STARTTLS)[-1].kind == Reply.ACK
            encrypt(wire, self.tls)
            assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == Reply.ACK
            assert wire.haggle(Option.SET_META_CONTEXT, meta_query("disk", "base:allocation"))
            assert wire.haggle(Option.GO, export_query("disk"))[-1].kind == Reply.ACK
        elif self.mode is Mode.SIMPLE:
            wire.go("disk")
        else:
            wire.go("disk", extended=self.mode is Mode.EXTENDED, contexts=("base:allocation",))
        return wire

    def _leave(self, wire: Wire) -> None:
        farewell = self._chance.choice(_FAREWELLS)
        with suppress(OSError):
            farewell(wire, self._batches[0])


def _politely(wire: Wire, batch: Batch) -> None:
    wire.send(Batch(batch.mode, [Asked(Command.DISC)]).sent)
    wire.is_closed_by_server()


def _half_closed(wire: Wire, batch: Batch) -> None:
    wire.socket.shutdown(socket.SHUT_WR)
    wire.is_closed_by_server()


def _abruptly(wire: Wire, batch: Batch) -> None:
    wire.send(batch.sent)


def _with_a_reset(wire: Wire, batch: Batch) -> None:
    wire.send(batch.sent)
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def _in_a_header(wire: Wire, batch: Batch) -> None:
    wire.send(batch.sent[:11])


def _in_a_payload(wire: Wire, batch: Batch) -> None:
    # At the end of the region, which nobody reads.
    region = batch.asked[0].offset // REGION * REGION
    write = Batch(batch.mode, [Asked(Command.WRITE, region + REGION - MIB, data=bytes(400 * KIB))])
    wire.send(write.sent[: 300 * KIB])


def _with_nonsense(wire: Wire, batch: Batch) -> None:
    wire.send(batch.sent[:1000], bytes(500))


_FAREWELLS: tuple[Callable[[Wire, Batch], None], ...] = (
    _politely, _half_closed, _abruptly, _with_a_reset, _in_a_header, _in_a_payload, _with_nonsense,
)  # fmt: skip


@dataclass
class Passerby:
    """Connects, and never becomes a client: port scans, garbage, half a handshake, half of TLS."""

    address: Address
    pause: float = 0.005

    def work(self, quota: Quota) -> None:
        """Until the quota is used up by others."""
        chance = random.Random(0)
        while quota.open:
            with suppress(OSError, EOFError), Wire(self.address, 5) as wire:
                chance.choice((self._scan, self._garbage, self._ask, self._half, self._tls, self._unknown))(
                    wire
                )
            time.sleep(self.pause)

    def _scan(self, wire: Wire) -> None:
        pass

    def _garbage(self, wire: Wire) -> None:
        wire.send(b"GET / HTTP/1.1\r\n\r\n")
        wire.is_closed_by_server()

    def _ask(self, wire: Wire) -> None:
        wire.greet()
        for number, data in [
            (Option.LIST, b""),
            (Option.INFO, export_query("disk", (1, 2, 3))),
            (Option.STRUCTURED_REPLY, b""),
            (Option.LIST_META_CONTEXT, meta_query("disk")),
            (Option.GO, export_query("nowhere")),
            (Option.GO, bytes(100_000)),
            (77, b"what is that"),
            (Option.ABORT, b""),
        ]:
            wire.haggle(number, data)

    def _half(self, wire: Wire) -> None:
        wire.greet()
        wire.send(option(Option.GO, export_query("disk"))[:-3])

    def _tls(self, wire: Wire) -> None:
        wire.greet()
        wire.haggle(Option.STARTTLS)
        wire.send(bytes.fromhex("16030100a5010000a10303") + bytes(40))

    def _unknown(self, wire: Wire) -> None:
        wire.greet()
        wire.send(option(Option.EXPORT_NAME, b"nowhere"))
        wire.is_closed_by_server()


@dataclass
class Deaf:
    """Asks for much, takes nothing for a while, and goes."""

    address: Address

    def work(self, quota: Quota) -> None:
        """Until the quota is used up by others."""
        while quota.open:
            with Wire(self.address, 60) as wire:
                wire.go("disk")
                wire.send(*[request(Command.READ, 0, MIB, cookie=index) for index in range(20)])
                time.sleep(0.3)


@dataclass
class Distant:
    """A client of an export behind another server, whose replies come in any order."""

    address: Address

    def work(self, quota: Quota) -> None:
        """Until the quota is used up by others."""
        data, written = random.Random(1).randbytes(5000), set(range(0, 16, 3))
        while quota.open:
            with Wire(self.address, 60) as wire:
                wire.go("far", structured=True)
                for _ in range(20):
                    wire.send(*(
                        request(Command.WRITE, index * MIB, cookie=index, data=data)
                        if index in written
                        else request(Command.READ, index * MIB + 5000, 5000, cookie=index)
                        for index in range(16)
                    ))  # fmt: skip
                    replies = [wire.chunks() for _ in range(16)]
                    assert {chunks[-1].cookie for chunks in replies} == set(range(16))
                    assert not any(chunk.error for chunks in replies for chunk in chunks)
                    quota.take(16)
                # The last time with requests on their way.
                wire.send(REQUEST.pack(REQUEST_MAGIC, 0, Command.READ, 1, 0, MIB) * 3)
