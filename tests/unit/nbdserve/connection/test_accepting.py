"""Where nobody can be accepted for a while, that is told once, and nobody does nothing but try again."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time

import pytest

from nbdserve.connection.accepting import INTERVAL, AcceptFailures
from nbdserve.connection.listeners import Listener
from nbdserve.connection.policy import Policy
from nbdserve.exports.served_exports import Exports
from nbdserve.monitor.scraping import HttpServer
from nbdserve.service.server import Server

ATTEMPTS = 3


class Full(socket.socket):
    """A listening socket of a process that has no descriptors left."""

    def accept(self) -> tuple[socket.socket, object]:
        """Fail as accept(2) does then."""
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.fixture
def full() -> Full:
    """One that listens."""
    sock = Full()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return sock


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were slept, which take no time here."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def test_the_first_failure_is_told_and_then_one_a_minute() -> None:
    now = [0.0]
    failures = AcceptFailures(lambda: now[0])
    full, memory = OSError(errno.EMFILE, ""), OSError(errno.ENOMEM, "")
    assert failures.is_news(full)
    assert not failures.is_news(full)
    assert failures.is_news(memory), "another reason is news"
    now[0] = INTERVAL
    assert failures.is_news(full)
    assert not failures.is_news(full)


def test_a_server_without_descriptors_pauses_and_says_so_once(
    full: Full, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener(full)
    server = Server(Exports({}), [listener], Policy())
    with full, caplog.at_level(logging.WARNING):
        for _ in range(ATTEMPTS):
            server._accept(listener)
        [line] = caplog.messages
    assert len(pauses) == ATTEMPTS
    assert "cannot accept a client: Too many open files" in line


def test_metrics_without_descriptors_pause_and_say_so_once(
    full: Full, pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    server = HttpServer(full)
    with caplog.at_level(logging.WARNING):
        for _ in range(ATTEMPTS):
            server._handle_request_noblock()  # type: ignore[attr-defined]
    server.server_close()
    assert len(pauses) == ATTEMPTS
    assert caplog.messages == ["metrics: cannot accept a client: Too many open files"]
