"""Connecting: what hardly ever happens, and then must not matter."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from nbdserve.client.dial import Countdown, connect_unix


@pytest.mark.parametrize("left", [0.999_999_9, 4.999_999_9, 5.0, 1e-9])
def test_a_unix_socket_is_connected_to_whatever_time_is_left(
    left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Countdown, "left", left)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        with connect_unix(str(tmp_path / "socket"), Countdown(5.0)) as peer:
            assert peer.getpeername() == str(tmp_path / "socket")
