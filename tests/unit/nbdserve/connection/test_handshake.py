"""Handshakes on a socket whose other end goes at the worst moment."""

from __future__ import annotations

import socket
import struct

import pytest

from nbdserve.connection.handshake import Terms, TimedSocket, shake_hands
from nbdserve.exports.served_exports import Exports
from tests.support.wire import Option, option


class Divided(TimedSocket):
    """A socket that gives its first bytes alone, however many there are, when the peer has closed its own."""

    def __init__(self, sock: socket.socket, peer: socket.socket, first: int) -> None:
        super().__init__(sock, 60.0)
        self._peer = peer
        self._first: int | None = first

    def recv(self, length: int) -> bytes:
        """Receive the first bytes, or all that there is."""
        first, self._first = self._first, None
        if first is not None:
            self._peer.close()
        return super().recv(first or length)


@pytest.mark.parametrize("first", [4, 12, 20])
def test_a_goodbye_is_none_the_less_one_where_it_arrives_after_its_sender_has_gone(first: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">I", 3) + option(Option.ABORT))
        outcome = shake_hands(Divided(ours, theirs, first), Exports(), Terms())
    assert outcome.agreement is None
