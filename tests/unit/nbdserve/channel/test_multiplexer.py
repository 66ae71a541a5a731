"""A multiplexer at work on a real socket, with this test at the other end of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from nbdserve.channel.local_ends import LocalEnd, from_socket
from nbdserve.channel.multiplexer import Multiplexer
from nbdserve.channel.transports import SocketTransport
from nbdserve.channel.wire.frames import (
    HEADER,
    Bye,
    Close,
    CloseReason,
    Control,
    Data,
    Decoder,
    Done,
    Open,
    Ram,
    Type,
    encode,
)
from nbdserve.channel.wire.greeting import Offer
from nbdserve.channel.wire.session import Role, Session
from nbdserve.channel.wire.streams import Stream
from nbdserve.common.errors import OperatorError
from nbdserve.common.threads import promised
from tests.support.channels import receive
from tests.support.processes import PATIENCE, wait_until

OFFER = Offer(16 << 20, 8, 15_000)
_WAIT = 10.0 * PATIENCE


class End:
    """One end of a channel, of which this test has the other, and the local ends of its streams."""

    def __init__(self, role: Role, stack: ExitStack) -> None:
        self.locals: dict[int, socket.socket] = {}
        ours, self.peer = socket.socketpair()
        self._stack = stack
        self._session = Session(role, OFFER, OFFER)
        self._mux = Multiplexer(SocketTransport(ours, "test"), self._session, self)
        self.peer.settimeout(_WAIT)
        stack.callback(self.peer.close)
        self._done = promised("multiplexer", self._mux.run)

    def open(self) -> int:
        """Open a stream from here."""
        return self._mux.ask(self._open).result(_WAIT)

    def local(self, number: int) -> socket.socket:
        """Return what stands for the user of a stream, which may be opened in a moment only."""
        wait_until(lambda: number in self.locals, "the stream")
        return self.locals[number]

    def _open(self) -> int:
        stream = self._session.open()
        self._mux.attach(self.opened(stream))
        return stream.number

    def opened(self, stream: Stream) -> LocalEnd:
        """The other end opens a stream."""
        ours, theirs = socket.socketpair()
        theirs.settimeout(_WAIT)
        self._stack.callback(theirs.close)
        self.locals[stream.number] = theirs
        return from_socket(stream, ours)

    def told(self, frame: Ram | Done | Bye | Close) -> None:
        """The other end says so."""

    def over(self, stream: Stream, why: str | None) -> None:
        """A stream is at its end."""

    def send(self, *frames: Control | bytes) -> None:
        """Send at once, as the other end."""
        self.peer.sendall(b"".join(each if isinstance(each, bytes) else encode(each) for each in frames))

    def close(self) -> None:
        """Hang up."""
        with suppress(OSError):
            self.send(Close(CloseReason.STOPPED))
        self.peer.close()
        with suppress(OperatorError):
            self._done.result(_WAIT)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def data_frame(stream: int, data: bytes) -> bytes:
    """A frame of data."""
    return HEADER.pack(Type.DATA, stream, len(data)) + data


def test_thousands_of_short_pieces_that_come_at_once_are_delivered(stack: ExitStack) -> None:
    end = End(Role.ACCEPTOR, stack)
    stack.callback(end.close)
    # More than one system call takes.
    data = bytes(range(250)) * 20
    end.send(Open(1), *(data_frame(1, bytes([each])) for each in data))
    assert receive(end.local(1), len(data)) == data


def test_a_reply_overtakes_ram_that_waits_on_a_carrier_that_is_slow(stack: ExitStack) -> None:
    end = End(Role.CONNECTOR, stack)
    stack.callback(end.close)
    ram = end.open()
    end.send(Open(2))
    disk = end.local(2)
    feeding = promised("ram", lambda: end.local(ram).sendall(bytes(12 << 20)))
    decoder, before = Decoder(), dict.fromkeys((ram, 2), 0)
    asked_at = 0
    while not before[2]:
        for frame in decoder.feed(memoryview(end.peer.recv(16 << 10))):
            if isinstance(frame, Data):
                before[frame.stream] += len(frame.piece)
        if not asked_at and before[ram] > 4 << 20:
            asked_at = before[ram]
            disk.sendall(b"reply")
    # What the kernel and a batch hold, not the megabytes that are ready.
    assert before[ram] - asked_at < 1 << 20
    while before[ram] < 12 << 20:
        for frame in decoder.feed(memoryview(end.peer.recv(1 << 20))):
            if isinstance(frame, Data):
                before[frame.stream] += len(frame.piece)
    feeding.result(_WAIT)
