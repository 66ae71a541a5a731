"""Reconnecting: whose fault a failure is, and connections that stand and fall together."""

from __future__ import annotations

import errno
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from nbdserve.client.dial import Pauses
from nbdserve.client.reconnect import DIAL_TIMEOUT, Connections, Dialler, Fault, fault_of
from nbdserve.common.errors import ConnectError


class Connection:
    """A client of an export with so many bytes."""

    def __init__(self, size: int = 512, quiet: float = 0.0) -> None:
        self.uri = "nbd://server"
        self.export = SimpleNamespace(size=size)
        self.connected = True
        self.quiet = quiet
        self.is_closed = False

    def hang_up(self) -> None:
        """Let it end."""
        self.connected = False

    def close(self) -> None:
        """It is over."""
        self.connected, self.is_closed = False, True


def connection(size: int = 512, quiet: float = 0.0) -> Any:
    """One, as a Client."""
    return Connection(size, quiet)


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (errno.ENOTCONN, Fault.CONNECTION),
        (errno.ETIMEDOUT, Fault.CONNECTION),
        (errno.ESHUTDOWN, Fault.CONNECTION),
        (errno.EPROTO, Fault.SERVER),
        (errno.EIO, Fault.REQUEST),
        (errno.ENOSPC, Fault.REQUEST),
        (errno.ECONNRESET, Fault.REQUEST),
    ],
)
def test_an_error_says_whether_another_connection_or_another_server_may_do_better(
    number: int, fault: Fault
) -> None:
    assert fault_of(OSError(number, "why")) is fault


def test_pauses_grow_up_to_the_longest_until_an_attempt_succeeds() -> None:
    pauses = Pauses(0.3)
    seen = []
    for _ in range(5):
        seen.append(pauses.next)
        pauses.grow()
    assert seen == [0.05, 0.1, 0.2, 0.3, 0.3]
    pauses.begin_anew()
    assert pauses.next == 0.05


def test_a_server_that_was_silent_gets_more_time_and_one_that_refuses_at_once_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, limits = 0.0, list[float]()
    takes = iter([0.0, 99.0, 99.0, 99.0, 0.0, 0.0, 99.0])
    fails = iter([True, True, True, True, True, False, True])

    def dial(seconds: float) -> Any:
        nonlocal now
        limits.append(seconds)
        now += min(seconds, next(takes))
        if next(fails):
            raise ConnectError("no")
        return connection()

    monkeypatch.setattr("nbdserve.client.reconnect.time", SimpleNamespace(monotonic=lambda: now))
    dialler = Dialler(dial, longest=4 * DIAL_TIMEOUT)
    for _ in range(7):
        try:
            dialler.connect()
        except ConnectError:
            pass
    assert limits == [DIAL_TIMEOUT * factor for factor in (1, 1, 2, 4, 4, 4, 1)]


def test_connections_are_lost_and_closed_together() -> None:
    first, second = connection(quiet=1.0), connection(quiet=2.0)
    together = Connections(first)
    together.add(second)
    assert (together.connected, together.quiet, together.clients) == (True, 2.0, (first, second))
    second.connected = False
    assert not together.connected
    together.close()
    together.close()
    assert first.is_closed
    assert second.is_closed


def test_a_connection_that_comes_after_the_others_were_closed_is_closed() -> None:
    together = Connections(connection())
    together.close()
    late = connection()
    together.add(late)
    assert late.is_closed
    assert late not in together.clients


def test_a_connection_to_a_disk_of_another_size_is_refused_and_closed() -> None:
    together = Connections(connection(512))
    other = connection(1024)
    with pytest.raises(ConnectError, match="nbd://server: told another size: 512 bytes, then 1024"):
        together.add(other)
    assert other.is_closed
    assert len(together.clients) == 1


def test_whichever_of_adding_and_closing_is_first_no_connection_stays_open() -> None:
    for _ in range(100):
        together, late = Connections(connection()), [connection() for _ in range(4)]
        threads = [threading.Thread(target=together.add, args=[each]) for each in late]
        threads.insert(2, threading.Thread(target=together.close))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert all(each.is_closed for each in late)
