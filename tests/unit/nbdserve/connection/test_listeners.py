"""Listening sockets: who gets one when several want it."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path

from nbdserve.common.errors import ConnectError
from nbdserve.connection.listeners import Listener, listen_unix


def test_of_many_that_find_a_dead_socket_at_once_one_gets_its_place(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    for _ in range(50):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        barrier, listening = threading.Barrier(6), list[Listener]()

        def come(barrier: threading.Barrier = barrier, found: list[Listener] = listening) -> None:
            barrier.wait()
            with suppress(ConnectError):
                found.append(listen_unix(str(path)))

        threads = [threading.Thread(target=come) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(listening) == 1
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        listening[0].close()
        assert not path.exists()


def test_a_socket_made_in_the_same_place_by_another_stays(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    ours = listen_unix(str(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        ours.close()
        assert path.exists()
