"""Reads of a source that end, whatever comes of them."""

from __future__ import annotations

import errno
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from overlay.backing.reads import Reading, new_pace
from tests.support.disks import KIB
from tests.support.exports import PLAIN

SIZE = 64 * KIB


class Server:
    """A client of a server whose answer comes when the test says so."""

    uri = "nbd://somewhere"
    size = SIZE
    export = replace(PLAIN, size=SIZE, minimum_block=4 * KIB)

    def __init__(self) -> None:
        self.answer: Future[None] = Future()

    def start_read(self, offset: int, buffer: memoryview) -> Future[None]:
        """The one read that there is."""
        return self.answer


def test_a_read_whose_answer_cannot_be_taken_has_failed() -> None:
    server: Any = Server()
    buffer = memoryview(bytearray(512))
    started = Reading(512, buffer).start(server, new_pace())
    assert not started.done()
    buffer.release()
    server.answer.set_result(None)
    assert started.done(), "somebody waits for it"
    with pytest.raises(OSError, match="ValueError") as failed:
        started.result()
    assert failed.value.errno == errno.ENOMEM
