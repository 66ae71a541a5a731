"""A short run of what ``make fuzz`` runs for long, and a model of the disk that the loop must agree with."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.channel.wire.frames import Decoder
from nbdserve.common.errors import ConnectionLostError, ProtocolError
from nbdserve.protocol.offers import Agreement, Mode
from nbdserve.transmission.loop import Transmission
from nbdserve.transmission.workers import Crew, Workers
from tests.fuzz import targets
from tests.fuzz.targets import SIZE
from tests.support import wire
from tests.support.memory import MemoryBackend, ScriptedStream
from tests.support.wire import Command

REQUESTS = st.builds(
    lambda command, flags, offset, length, data: wire.request(
        command, offset, length, cookie=offset, flags=flags, data=data if command == Command.WRITE else b""
    ),
    st.sampled_from([*Command, 8, 99]),
    st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32, 1 << 15]),
    st.one_of(st.integers(0, SIZE + 10), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, SIZE), st.integers(0, 2**32 - 1)),
    st.binary(min_size=1, max_size=50),
)


@given(st.binary(max_size=400))
def test_any_bytes_haggle_without_harm(data: bytes) -> None:
    targets.haggle(struct.pack(">I", 3) + data)


@given(st.integers(0, 255), st.lists(st.one_of(REQUESTS, st.binary(max_size=30)), max_size=10))
def test_any_bytes_transmit_without_harm(choice: int, pieces: list[bytes]) -> None:
    targets.transmit(bytes([choice]) + b"".join(pieces))


@given(st.integers(0, 15), st.binary(max_size=400), st.booleans())
def test_any_bytes_come_over_a_channel_without_harm(choice: int, data: bytes, begun: bool) -> None:
    begin = targets.channel_seed(choice)[: len(data) % 150] if begun else b""
    targets.channel(bytes([choice]) + begin + data)


@pytest.mark.parametrize("choice", range(16))
def test_what_a_channel_is_fuzzed_from_is_all_in_its_specification(choice: int) -> None:
    read = list(Decoder().feed(memoryview(targets.channel_seed(choice))))
    assert len({type(frame) for frame in read}) == len(read) >= 9
    targets.channel(bytes([choice]) + targets.channel_seed(choice))


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_greet_without_being_let_in(data: bytes, begun: bool) -> None:
    targets.greet(targets.HELLO * begun + data)


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from([Command.READ, Command.WRITE, Command.WRITE_ZEROES, Command.TRIM]),
        st.integers(0, SIZE - 1),
        st.binary(min_size=1, max_size=300),
    ),
    max_size=30,
)


@given(ACTIONS, st.sampled_from([1, 7, 100, 1 << 20]))
def test_a_history_of_requests_reads_back_as_a_byte_array_would(
    history: list[tuple[Command, int, bytes]], piece: int
) -> None:
    backend, model = MemoryBackend(SIZE), bytearray(SIZE)
    script, expected = bytearray(), bytearray()
    for number, (command, offset, data) in enumerate(history):
        data = data[: SIZE - offset]
        payload = data if command == Command.WRITE else b""
        script += wire.request(command, offset, len(data), cookie=number, data=payload)
        expected += wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, number)
        if command == Command.READ:
            expected += model[offset : offset + len(data)]
        else:
            model[offset : offset + len(data)] = payload or bytes(len(data))
    stream = ScriptedStream(bytes(script), piece)
    agreement = Agreement(targets.offer_of(backend, read_only=False), Mode.SIMPLE)
    Transmission(stream, agreement, backend, b"", Crew(Workers(1), Workers(1))).run()
    assert stream.sent == expected
    assert backend.content == model


@given(ACTIONS, st.integers(0, 400))
def test_a_client_that_goes_away_anywhere_leaves_what_it_was_told_is_stored(
    history: list[tuple[Command, int, bytes]], cut: int
) -> None:
    backend = MemoryBackend(SIZE)
    script = bytearray()
    for number, (_, offset, data) in enumerate(history):
        script += wire.request(Command.WRITE, offset, cookie=number, data=data[: SIZE - offset])
    stream = ScriptedStream(bytes(script[:-cut]) if cut else bytes(script), 64)
    agreement = Agreement(targets.offer_of(backend, read_only=False), Mode.SIMPLE)
    try:
        Transmission(stream, agreement, backend, b"", Crew(Workers(1), Workers(1))).run()
    except (ProtocolError, ConnectionLostError):
        pass
    model = bytearray(SIZE)
    for _, offset, data in history[: len(stream.sent) // wire.SIMPLE_REPLY.size]:
        model[offset : offset + len(data[: SIZE - offset])] = data[: SIZE - offset]
    assert backend.content == model
