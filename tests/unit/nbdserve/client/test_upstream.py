"""Requests to a server that is lost: each waits for it to come back, however long it has waited before."""

from __future__ import annotations

import errno
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from nbdserve.client import Upstream
from nbdserve.common.errors import ConnectError

PATIENCE = 60.0
"""Seconds, longer than the server is away."""


class Connection:
    """A client whose requests are answered when the test says so."""

    def __init__(self) -> None:
        self.export: Any = None
        self.connected = True
        self.quiet = 0.0
        self.requests: list[Future[str]] = []

    def start(self) -> Future[str]:
        """Begin a request."""
        self.requests.append(Future())
        return self.requests[-1]

    def hang_up(self) -> None:
        """Let it end."""
        self.connected = False

    def close(self) -> None:
        """It is over."""
        self.connected = False


class Export:
    """What is of interest of one."""

    size, multi_conn, flush = 512, False, True


class Server:
    """It is away after the first connection, for some attempts to reach it."""

    def __init__(self, away: int) -> None:
        self.connections: list[Connection] = []
        self.away = away

    def dial(self, timeout: float) -> Any:
        """A connection; ConnectError while it is away."""
        if self.connections and self.away:
            self.away -= 1
            raise ConnectError("it is away")
        connection = Connection()
        connection.export = Export()
        if self.connections:
            for _ in range(8):
                done: Future[str] = Future()
                done.set_result("done")
                connection.requests.append(done)
            connection.start = connection.requests.pop  # type: ignore[method-assign]
        self.connections.append(connection)
        return connection


class Now:
    """The module ``time``, at a later time."""

    def __init__(self) -> None:
        self.later = 0.0

    def monotonic(self) -> float:
        """Seconds."""
        return time.monotonic() + self.later

    def sleep(self, seconds: float) -> None:
        """As it is."""
        time.sleep(seconds)


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.ETIMEDOUT])
def test_requests_that_have_waited_long_wait_for_a_server_that_is_lost_only_then(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = Now()
    monkeypatch.setattr("nbdserve.client.upstream.time", now)
    server = Server(away=3)
    upstream = Upstream("disk", server.dial, patience=PATIENCE)
    begun = threading.Semaphore(0)

    def ask(connection: Connection) -> Future[str]:
        future = connection.start()
        begun.release()
        return future

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(upstream.call, ask) for _ in range(4)]  # type: ignore[arg-type]
        for _ in waiting:
            assert begun.acquire(timeout=60)
        now.later = 2 * PATIENCE
        for request in list(server.connections[0].requests):
            request.set_exception(OSError(number, "lost"))
        assert [each.result(120) for each in waiting] == ["done"] * 4
