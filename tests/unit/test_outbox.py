"""Replies of many threads on their way to one client."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from nbdserve.errors import ConnectionLostError
from nbdserve.outbox import CAPACITY, Outbox
from tests.support.memory import ScriptedStream


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads that are started now take turns between any two instructions of an outbox's methods."""

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
    outbox = Outbox(stream)
    over = [0] * posters

    def post(number: int) -> None:
        def done() -> None:
            over[number] += 1

        for _ in range(posts):
            outbox.post(memoryview(bytes([number])), done)

    threads = [threading.Thread(target=post, args=(number,)) for number in range(posters)]
    for thread in threads:
        thread.start()
    flushed = 0
    while any(thread.is_alive() for thread in threads):
        outbox.add(b"\xff")
        outbox.flush()
        flushed += 1
    assert over == [posts] * posters
    counts = [stream.sent.count(bytes([number])) for number in (*range(posters), 255)]
    assert counts == [*over, flushed]


def test_what_cannot_be_settled_is_never_acknowledged() -> None:
    stream, settled, error = ScriptedStream(b"", 1), 0, OSError(errno.ENOSPC, "No space left on device")

    def settle() -> None:
        nonlocal settled
        settled += 1
        if settled > 2:
            raise error

    outbox = Outbox(stream, settle)
    outbox.add(b"kept")
    outbox.flush()
    outbox.flush()
    assert (settled, bytes(stream.sent)) == (1, b"kept"), "nothing to send, nothing to settle"
    outbox.add(b"also")
    outbox.reserve(CAPACITY)
    outbox.add(b"lost")
    for attempt in (outbox.flush, outbox.flush):
        with pytest.raises(ConnectionLostError, match="cannot be kept: No space left on device"):
            attempt()
    outbox.post(memoryview(b"late"), lambda: None)
    assert bytes(stream.sent) == b"keptalso"
