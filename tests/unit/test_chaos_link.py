"""The link that chaos puts between the hosts does to what goes through it what it says."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.link import Link, Trouble, link
from tests.support.processes import wait_until
from tests.support.servers import UnixAddress

Ends = tuple[Link, socket.socket, socket.socket]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    """A link, and a connection through it: the client's end and the server's."""
    near, far = UnixAddress(tmp_path / "near"), UnixAddress(tmp_path / "far")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(far.path))
        listener.listen()
        with link(near, far) as made, near.connect() as client, listener.accept()[0] as server:
            client.sendall(b"hello")
            assert server.recv(16) == b"hello"
            yield made, client, server


def test_what_is_dropped_ends_and_nobody_comes_in_until_it_is_well(ends: Ends, tmp_path: Path) -> None:
    made, client, server = ends
    made.set(Trouble.DROP)
    assert client.recv(1) == b""
    assert server.recv(1) == b""
    with UnixAddress(tmp_path / "near").connect() as again:
        assert again.recv(1) == b""
    assert made.affected == 3


@pytest.mark.parametrize("trouble", [Trouble.HOLD_ANSWERS, Trouble.HOLD_REQUESTS])
def test_what_is_held_one_way_comes_later_and_the_other_way_is_free(ends: Ends, trouble: Trouble) -> None:
    made, client, server = ends
    held, free = (server, client) if trouble is Trouble.HOLD_ANSWERS else (client, server)
    made.set(trouble)
    held.sendall(b"held")
    free.sendall(b"free")
    assert held.recv(16) == b"free"
    wait_until(lambda: made.affected == 1, "something is held")
    free.settimeout(0.05)
    with pytest.raises(TimeoutError):
        free.recv(16)
    made.set(Trouble.NONE)
    free.settimeout(60.0)
    assert free.recv(16) == b"held"


def test_what_is_cut_ends_in_the_middle_and_only_once(ends: Ends, tmp_path: Path) -> None:
    made, client, server = ends
    made.set(Trouble.CUT)
    server.sendall(b"12345678")
    assert client.recv(16) == b"1234"
    assert client.recv(16) == b""
    assert made.affected == 1
