"""Replies of many threads on their way to one client."""

from __future__ import annotations

import errno
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from nbdserve.backends.splicing import FileRange
from nbdserve.common.errors import ConnectionLostError
from nbdserve.transmission.reply_buffer import CAPACITY, ReplyBuffer
from tests.support.memory import ScriptedStream
from tests.support.processes import wait_until


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads that are started now take turns between any two instructions of an reply_buffer's methods."""

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if frame.f_code.co_name not in ("_send_posted", "post", "_send"):
            return None
        frame.f_trace_opcodes = True
        return trace

    interval, before = sys.getswitchinterval(), threading.gettrace()
    sys.setswitchinterval(1e-6)
    threading.settrace(trace)
    yield
    threading.settrace(before)
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless")
def test_replies_that_are_posted_while_others_are_sent_go_out_once() -> None:
    """A thread that finds its reply sent by another one meanwhile has nothing left to do."""
    stream, posts, posters = ScriptedStream(b"", 1), 500, 4
    reply_buffer = ReplyBuffer(stream)
    over = [0] * posters

    def post(number: int) -> None:
        def done() -> None:
            over[number] += 1

        for _ in range(posts):
            reply_buffer.post(memoryview(bytes([number])), done)

    threads = [threading.Thread(target=post, args=(number,)) for number in range(posters)]
    for thread in threads:
        thread.start()
    flushed = 0
    while any(thread.is_alive() for thread in threads):
        reply_buffer.add(b"\xff")
        reply_buffer.flush()
        flushed += 1
    assert over == [posts] * posters
    counts = [stream.sent.count(bytes([number])) for number in (*range(posters), 255)]
    assert counts == [*over, flushed]


def test_what_cannot_be_settled_is_never_acknowledged() -> None:
    stream, settled, error = ScriptedStream(b"", 1), 0, OSError(errno.ENOSPC, "No space left on device")

    def log_writes() -> None:
        nonlocal settled
        settled += 1
        if settled > 2:
            raise error

    reply_buffer = ReplyBuffer(stream, log_writes)
    reply_buffer.add(b"kept")
    reply_buffer.flush()
    reply_buffer.flush()
    assert (settled, bytes(stream.sent)) == (1, b"kept"), "nothing to send, nothing to log_writes"
    reply_buffer.add(b"also")
    reply_buffer.reserve(CAPACITY)
    reply_buffer.add(b"lost")
    for attempt in (reply_buffer.flush, reply_buffer.flush):
        with pytest.raises(ConnectionLostError, match="cannot be kept: No space left on device"):
            attempt()
    reply_buffer.post(memoryview(b"late"), lambda: None)
    assert bytes(stream.sent) == b"keptalso"


class Stuck(ScriptedStream):
    """A client that takes half of what it is sent, and then nothing: sending fails when ``gate`` opens."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(b"", 1)
        self.gate, self.sending = threading.Event(), threading.Event()
        self._error = error

    def sendall(self, data: bytes | bytearray | memoryview, /) -> None:
        """Take half of it."""
        self.sent += data[: len(data) // 2]
        self.sending.set()
        assert self.gate.wait(10)
        raise self._error


class Account:
    """How often each reply that was posted is over."""

    def __init__(self, reply_buffer: ReplyBuffer) -> None:
        self._reply_buffer = reply_buffer
        self._over: list[int] = []

    def post(self, data: bytes) -> None:
        """Post a reply."""
        number = len(self._over)
        self._over.append(0)

        def over() -> None:
            self._over[number] += 1

        self._reply_buffer.post(memoryview(data), over)

    @property
    def settled(self) -> bool:
        """Whether each of them is over, once."""
        return all(count == 1 for count in self._over)


FAILURES = [TimeoutError(errno.EAGAIN, "time is up"), BrokenPipeError(errno.EPIPE, "gone"), MemoryError()]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("sender", ["loop", "worker"])
def test_replies_that_were_left_to_a_sender_that_fails_are_over(sender: str, failure: BaseException) -> None:
    stream, reasons = Stuck(failure), list[str]()
    reply_buffer = ReplyBuffer(stream, lost=reasons.append)
    account = Account(reply_buffer)
    failed: list[bool] = []

    def send() -> None:
        if sender == "worker":
            account.post(b"its own")
            failed.append(True)
            return
        reply_buffer.add(b"gathered")
        try:
            reply_buffer.flush()
        except ConnectionLostError:
            failed.append(True)

    sending = threading.Thread(target=send)
    sending.start()
    assert stream.sending.wait(10)
    for number in range(60):
        account.post(b"left to it %d" % number)
    assert not account.settled
    stream.gate.set()
    sending.join(10)
    assert failed
    account.post(b"after the end")
    assert account.settled
    assert len(reasons) == 1
    assert bytes(stream.sent) == (b"gathered" if sender == "loop" else b"its own")[: len(stream.sent)]
    with pytest.raises(ConnectionLostError):
        reply_buffer.add(bytes(CAPACITY + 1))
    assert len(stream.sent) < 8, "nothing is sent after half of a reply"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[FileRange]:
    """A megabyte in a file."""
    (tmp_path / "disk.img").write_bytes(b"disk" * (256 << 10))
    with (tmp_path / "disk.img").open("rb") as file:
        yield FileRange(file.fileno(), 0)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client and the server's end of its connection, which gives up after 0.2 s without progress."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 200_000))
    theirs.settimeout(10)
    with ours, theirs:
        yield ours, theirs


def everything(client: socket.socket) -> bytes:
    """All that the client can still receive."""
    received = bytearray()
    while data := client.recv(1 << 20):
        received += data
    return bytes(received)


def test_nothing_is_spliced_into_the_middle_of_a_reply(
    pair: tuple[socket.socket, socket.socket], source: FileRange
) -> None:
    ours, client = pair
    reply_buffer = ReplyBuffer(ours, lost=lambda _: ours.shutdown(socket.SHUT_RDWR))
    account = Account(reply_buffer)
    length = reply_buffer.most_to_splice(source)
    account.post(b"posted--" * (1 << 20))
    assert account.settled, "given up after half of it"
    room = client.recv(1 << 20)
    assert room
    with pytest.raises(ConnectionLostError, match="takes no replies"):
        reply_buffer.splice(bytearray(b"head"), source, length)
    received = room + everything(client)
    assert received == (b"posted--" * (1 << 20))[: len(received)]
    assert len(received) < 8 << 20
    reply_buffer.close()


def test_replies_that_were_left_to_one_who_splices_in_vain_are_over(
    pair: tuple[socket.socket, socket.socket], source: FileRange
) -> None:
    ours, client = pair
    reply_buffer = ReplyBuffer(ours, lost=lambda _: ours.shutdown(socket.SHUT_RDWR))
    account = Account(reply_buffer)
    length = reply_buffer.most_to_splice(source)
    outcome: list[type[Exception]] = []
    sent = threading.Semaphore(0)

    def splice() -> None:
        try:
            for _ in range(100):
                reply_buffer.splice(bytearray(b"head"), source, length)
                sent.release()
        except ConnectionLostError:
            outcome.append(ConnectionLostError)

    # It has no time-out while it is left replies: it waits until the client is gone.
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 0))
    splicing = threading.Thread(target=splice)
    splicing.start()
    while sent.acquire(timeout=0.5):
        client.recv(1)
    for number in range(60):
        account.post(b"left to it %d" % number)
    client.close()
    splicing.join(10)
    assert outcome == [ConnectionLostError]
    wait_until(lambda: account.settled, "all of them are over")
    reply_buffer.close()
