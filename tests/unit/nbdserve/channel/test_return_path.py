"""QEMU's return path: what it says is understood, and nothing is believed that is not."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.channel.wire.return_path import ReturnPath, Verdict


def message(kind: int, payload: bytes) -> bytes:
    """A message as QEMU sends it."""
    return struct.pack(">HH", kind, len(payload)) + payload


PONG, PAGES = message(2, bytes(4)), message(4, bytes(12))
LOADED, FAILED = message(1, bytes(4)), message(1, b"\0\0\0\1")


@pytest.mark.parametrize("piece", [1, 3, 7, 100])
@pytest.mark.parametrize(("end", "verdict"), [(LOADED, Verdict.LOADED), (FAILED, Verdict.FAILED)])
def test_the_last_message_says_whether_all_was_loaded(piece: int, end: bytes, verdict: Verdict) -> None:
    path, said = ReturnPath(), PONG + PAGES * 50 + end
    for at in range(0, len(said) - 1, piece):
        path.feed(said[at : min(at + piece, len(said) - 1)])
    assert path.verdict is Verdict.UNDER_WAY
    path.feed(said[-1:])
    assert path.verdict is verdict
    path.feed(b"anything")
    assert path.verdict is verdict


@pytest.mark.parametrize("strange", [message(5, b"\0\0\0\0"), message(1, b"\0"), b"\0\2\x40\0"])
def test_behind_what_is_not_understood_nothing_is_believed(strange: bytes) -> None:
    path = ReturnPath()
    path.feed(strange + LOADED)
    assert path.verdict is Verdict.UNKNOWN


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_it_keeps_no_more_than_a_message(pieces: list[bytes]) -> None:
    path = ReturnPath()
    for piece in pieces:
        path.feed(piece)
        assert len(path._partial) < 4 + 512 + 40
