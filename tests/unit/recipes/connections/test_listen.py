"""A tunnel's end of one host where nobody can be accepted, for lack of descriptors."""

from __future__ import annotations

import errno
import json
import os
import socket
import time

import pytest

from nbdserve.connection.listeners import Listener
from recipes.connections.listen import End

ATTEMPTS = 3


class Full(socket.socket):
    """A listening socket of a process that has no descriptors left."""

    def accept(self) -> tuple[socket.socket, object]:
        """Fail as accept(2) does then."""
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("which", ["a client", "a taker"])
def test_an_end_that_cannot_accept_pauses_and_says_so_once(
    which: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with End(Listener(Full(socket.AF_UNIX)), Listener(Full(socket.AF_UNIX))) as end:
        for _ in range(ATTEMPTS):
            if which == "a client":
                end._accept()
            else:
                assert end._serve() == -1
    assert len(pauses) == ATTEMPTS
    told = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert told == [{"waiting": "a client cannot be accepted: Too many open files"}]
