"""Frames: each is read as it was written, however it is cut, and nothing else is."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.channel.wire.frames import (
    HEADER,
    MOST_DATA,
    MOST_TEXT,
    Bye,
    Close,
    CloseReason,
    Control,
    Credit,
    Data,
    Decoder,
    Done,
    End,
    Frame,
    Open,
    Ping,
    Pong,
    Ram,
    RamStatus,
    Reset,
    ResetReason,
    Type,
    encode,
)
from nbdserve.common.errors import ProtocolError

STREAMS = st.integers(1, 2**32 - 1)
TEXTS = st.text(st.characters(categories=["L", "N", "P"]), max_size=MOST_TEXT // 4)
FRAMES: st.SearchStrategy[Control] = st.one_of(
    st.builds(Credit, STREAMS, st.integers(1, 2**32 - 1)),
    st.builds(Open, STREAMS),
    st.builds(End, STREAMS),
    st.builds(Reset, STREAMS, st.sampled_from(ResetReason), TEXTS),
    st.builds(Ping, st.integers(0, 2**64 - 1)),
    st.builds(Pong, st.integers(0, 2**64 - 1)),
    st.builds(Ram, st.sampled_from(RamStatus)),
    st.just(Done()),
    st.just(Bye()),
    st.builds(Close, st.sampled_from(CloseReason), TEXTS),
)
PAYLOADS = st.tuples(STREAMS, st.binary(min_size=1, max_size=300))


@given(st.lists(st.one_of(FRAMES, PAYLOADS), max_size=8), st.integers(1, 50))
def test_frames_are_read_as_they_were_written_however_they_are_cut(
    written: list[Control | tuple[int, bytes]], piece: int
) -> None:
    wire = b"".join(
        HEADER.pack(Type.DATA, each[0], len(each[1])) + each[1] if isinstance(each, tuple) else encode(each)
        for each in written
    )
    decoder = Decoder()
    read: list[Control | tuple[int, bytes]] = []
    for at in range(0, len(wire), piece):
        for frame in decoder.feed(memoryview(wire)[at : at + piece]):
            read.append((frame.stream, bytes(frame.piece)) if isinstance(frame, Data) else frame)
    assert decoder.is_between_frames
    assert joined(read) == joined(written)


def joined(frames: list[Control | tuple[int, bytes]]) -> list[Control | tuple[int, bytes]]:
    """The same with what follows itself on a stream in one piece."""
    found: list[Control | tuple[int, bytes]] = []
    for frame in frames:
        last = found[-1] if found else None
        if isinstance(frame, tuple) and isinstance(last, tuple) and last[0] == frame[0]:
            found[-1] = last[0], last[1] + frame[1]
        else:
            found.append(frame)
    return found


@given(st.binary(max_size=200))
def test_any_bytes_are_frames_or_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        for frame in Decoder().feed(memoryview(data)):
            assert isinstance(frame, Frame)


def frame(kind: int, stream: int, payload: bytes = b"") -> bytes:
    """Any frame."""
    return HEADER.pack(kind, stream, len(payload)) + payload


WRONG = {
    "type 0": frame(0, 0),
    "an unknown type": frame(12, 0),
    "data of nothing": frame(Type.DATA, 1),
    "data that is too long": HEADER.pack(Type.DATA, 1, MOST_DATA + 1),
    "data of no stream": frame(Type.DATA, 0, b"x"),
    "a credit of nothing": frame(Type.CREDIT, 1, bytes(4)),
    "a credit that is too short": frame(Type.CREDIT, 1, b"x"),
    "a stream opened with more than its number": frame(Type.OPEN, 1, struct.pack(">I", 0)),
    "an end with a payload": frame(Type.END, 1, b"x"),
    "a reset without a reason": frame(Type.RESET, 1, bytes(4)),
    "a text that is too long": frame(Type.RESET, 1, struct.pack(">I", 1) + b"x" * (MOST_TEXT + 1)),
    "a text that is no UTF-8": frame(Type.CLOSE, 0, struct.pack(">I", 1) + b"\xff"),
    "a text that moves the cursor": frame(Type.CLOSE, 0, struct.pack(">I", 1) + b"\x1b[2J"),
    "a ping for a stream": frame(Type.PING, 1, bytes(8)),
    "a ping that is too short": frame(Type.PING, 0, bytes(4)),
    "an unknown status": frame(Type.RAM, 0, struct.pack(">I", 3)),
    "a payload of DONE": frame(Type.DONE, 0, b"x"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("piece", [1, 1000])
def test_what_is_not_in_the_specification_is_refused_in_one_line(what: str, piece: int) -> None:
    with pytest.raises(ProtocolError, match=r"^channel: [^\n]*$"):
        read(WRONG[what], piece)


def read(wire: bytes, piece: int) -> None:
    """Read what is cut into pieces."""
    decoder = Decoder()
    for at in range(0, len(wire), piece):
        list(decoder.feed(memoryview(wire)[at : at + piece]))


@given(st.text(max_size=400))
def test_whatever_text_is_sent_can_be_read(text: str) -> None:
    [close] = Decoder().feed(memoryview(encode(Close(CloseReason.FAILED, text))))
    assert isinstance(close, Close)
    assert len(close.text.encode()) <= MOST_TEXT
