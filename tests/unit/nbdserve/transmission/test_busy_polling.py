"""When a server stays awake for a client's next request, and when it does not."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from nbdserve.transmission import busy_polling as busy_polling_module
from nbdserve.transmission.busy_polling import BusyPolling, Watch

MOMENT = 0.2


class Clock:
    """In the place of the module ``time``: it goes on by a millisecond whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """What time it is, in seconds."""
        self.now += 0.001
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The only clock that there is, so that other processes make no difference."""
    clock = Clock()
    monkeypatch.setattr(busy_polling_module, "time", clock)
    return clock


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """On a machine with two processors, wherever the tests run."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    return Watch(MOMENT)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def seconds_awake(busy_polling: BusyPolling, clock: Clock) -> float:
    """How long it looks out."""
    before = clock.now
    busy_polling.begin()
    return clock.now - before


def serve_quickly(busy_polling: BusyPolling) -> None:
    """A wait that was short."""
    busy_polling.begin()
    busy_polling.end()


def test_it_looks_out_after_a_short_wait_and_not_after_a_long_one(
    watch: Watch, clock: Clock, ends: tuple[socket.socket, socket.socket]
) -> None:
    busy_polling = BusyPolling(ends[0], watch)
    assert seconds_awake(busy_polling, clock) < MOMENT / 10
    serve_quickly(busy_polling)
    assert seconds_awake(busy_polling, clock) > MOMENT / 10
    busy_polling.begin()
    clock.now += 3 * MOMENT
    busy_polling.end()
    assert seconds_awake(busy_polling, clock) < MOMENT / 10


def test_it_looks_no_longer_when_something_has_come(
    watch: Watch, clock: Clock, ends: tuple[socket.socket, socket.socket]
) -> None:
    busy_polling = BusyPolling(ends[0], watch)
    serve_quickly(busy_polling)
    ends[1].send(b"!")
    assert seconds_awake(busy_polling, clock) < MOMENT / 10


def test_it_looks_no_longer_when_the_client_has_gone(
    watch: Watch, clock: Clock, ends: tuple[socket.socket, socket.socket]
) -> None:
    busy_polling = BusyPolling(ends[0], watch)
    serve_quickly(busy_polling)
    ends[1].close()
    assert seconds_awake(busy_polling, clock) < MOMENT / 10


def test_only_the_client_that_was_served_last_is_looked_out_for(
    watch: Watch, clock: Clock, ends: tuple[socket.socket, socket.socket]
) -> None:
    first, second = BusyPolling(ends[0], watch), BusyPolling(ends[1], watch)
    serve_quickly(first)
    serve_quickly(second)
    assert seconds_awake(first, clock) < MOMENT / 10
    assert seconds_awake(second, clock) > MOMENT / 10


@pytest.mark.parametrize(("moment", "processors"), [(0.0, {0, 1}), (MOMENT, {0})])
def test_nobody_is_looked_out_for_where_that_is_off_or_there_is_one_processor(
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    ends: tuple[socket.socket, socket.socket],
    moment: float,
    processors: set[int],
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: processors)
    busy_polling = BusyPolling(ends[0], Watch(moment))
    serve_quickly(busy_polling)
    assert seconds_awake(busy_polling, clock) < MOMENT / 10
