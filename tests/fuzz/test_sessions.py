"""Whole sessions over a real socket, in any order: several clients haggle, read, write, misbehave and leave.

A bytearray is the model of the disk: every reply must be the one that it gives, whatever others do meanwhile.
"""

from __future__ import annotations

import struct
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support.servers import Server, nbdserve
from tests.support.wire import Command, Flag, Option, Reply, Wire, export_query, meta_query, option, request

SIZE = 10_007
EINVAL, ENOSPC = 22, 28
OFFSETS, LENGTHS = st.integers(0, SIZE - 1), st.integers(1, 3000)
PLACES = st.integers(0, 2)


class Haggler(Wire):
    """A client that has not chosen an export yet, and what it has agreed on so far."""

    structured = False
    context = False


class Sessions(RuleBasedStateMachine):
    """Three places for clients, each empty, haggling or in transmission."""

    server: Server
    model: bytearray

    def __init__(self) -> None:
        super().__init__()
        self.haggling: dict[int, Haggler] = {}
        self.sending: dict[int, Haggler] = {}
        self.cookie = 0

    def teardown(self) -> None:
        """Everybody leaves without a word."""
        for wire in (*self.haggling.values(), *self.sending.values()):
            wire.socket.close()

    @rule(place=PLACES)
    def connect(self, place: int) -> None:
        """A client comes, unless its place is taken."""
        if place not in self.haggling and place not in self.sending:
            wire = self.haggling[place] = Haggler(self.server.address)
            wire.greet()

    @precondition(lambda self: self.haggling)
    @rule(data=st.data(), junk=st.binary(max_size=60))
    def haggle(self, data: st.DataObject, junk: bytes) -> None:
        """An option that leaves the client where it is, in order or not."""
        wire = self.haggling[data.draw(st.sampled_from(sorted(self.haggling)))]
        step = data.draw(
            st.sampled_from(["list", "info", "structured", "context", "nowhere", "unknown", "junk"])
        )
        if step == "list":
            assert [reply.kind for reply in wire.haggle(Option.LIST)] == [Reply.SERVER, Reply.ACK]
        elif step == "info":
            first, *_, last = wire.haggle(Option.INFO, export_query(""))
            assert struct.unpack(">HQ", first.data[:10]) == (0, SIZE)
            assert last.kind == Reply.ACK
        elif step == "structured":
            expected = Reply.ERR_INVALID if wire.structured else Reply.ACK
            assert wire.haggle(Option.STRUCTURED_REPLY)[-1].kind == expected
            wire.structured = True
        elif step == "context":
            *found, last = wire.haggle(Option.SET_META_CONTEXT, meta_query("", "base:allocation"))
            assert last.kind == (Reply.ACK if wire.structured else Reply.ERR_INVALID)
            assert len(found) == wire.structured
            wire.context = wire.structured
        elif step == "nowhere":
            assert wire.haggle(Option.GO, export_query("nowhere"))[-1].kind == Reply.ERR_UNKNOWN
        elif step == "unknown":
            assert wire.haggle(1000, junk)[-1].kind == Reply.ERR_UNSUP
        else:
            assert wire.haggle(Option.LIST, junk + b"x")[-1].kind == Reply.ERR_INVALID

    @precondition(lambda self: self.haggling)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        """A client chooses the export."""
        place = data.draw(st.sampled_from(sorted(self.haggling)))
        wire = self.sending[place] = self.haggling.pop(place)
        assert wire.haggle(Option.GO, export_query(""))[-1].kind == Reply.ACK

    @precondition(lambda self: self.haggling)
    @rule(data=st.data(), junk=st.binary(min_size=16, max_size=100))
    def haggle_nonsense(self, data: st.DataObject, junk: bytes) -> None:
        """A client sends what is no option, or half of one, and is gone."""
        with self.haggling.pop(data.draw(st.sampled_from(sorted(self.haggling)))) as wire:
            broken = data.draw(
                st.sampled_from([b"\0" + junk, option(Option.GO, junk)[:-1], option(Option.ABORT)])
            )
            wire.send(broken)

    @precondition(lambda self: self.sending)
    @rule(data=st.data(), offset=OFFSETS, length=LENGTHS)
    def read(self, data: st.DataObject, offset: int, length: int) -> None:
        """What is read is what the model holds."""
        wire = self._somebody(data)
        wire.send(self._request(Command.READ, offset, length))
        if offset + length > SIZE:
            assert self._error(wire) == EINVAL
        else:
            assert self._data(wire, offset, length) == self.model[offset : offset + length]

    @precondition(lambda self: self.sending)
    @rule(
        data=st.data(),
        offset=OFFSETS,
        payload=st.binary(min_size=1, max_size=3000),
        flags=st.sampled_from([0, Flag.FUA]),
    )
    def write(self, data: st.DataObject, offset: int, payload: bytes, flags: int) -> None:
        """What was acknowledged is in the model."""
        wire = self._somebody(data)
        wire.send(self._request(Command.WRITE, offset, flags=flags, data=payload))
        fits = offset + len(payload) <= SIZE
        assert self._error(wire) == (0 if fits else ENOSPC)
        if fits:
            self.model[offset : offset + len(payload)] = payload

    @precondition(lambda self: self.sending)
    @rule(
        data=st.data(),
        offset=OFFSETS,
        length=LENGTHS,
        command=st.sampled_from([Command.WRITE_ZEROES, Command.TRIM]),
    )
    def zero(self, data: st.DataObject, offset: int, length: int, command: Command) -> None:
        """A trim of a file is a hole, too."""
        wire = self._somebody(data)
        wire.send(self._request(command, offset, length))
        fits = offset + length <= SIZE
        beyond = ENOSPC if command == Command.WRITE_ZEROES else EINVAL
        assert self._error(wire) == (0 if fits else beyond)
        if fits:
            self.model[offset : offset + length] = bytes(length)

    @precondition(lambda self: self.sending)
    @rule(
        data=st.data(), command=st.sampled_from([Command.FLUSH, Command.CACHE, Command.BLOCK_STATUS, 8, 77])
    )
    def other(self, data: st.DataObject, command: int) -> None:
        """Commands that leave the content alone."""
        wire = self._somebody(data)
        wire.send(self._request(command, 0, 0 if command == Command.FLUSH else 512))
        refused = command > Command.BLOCK_STATUS or (command == Command.BLOCK_STATUS and not wire.context)
        assert self._error(wire) == (EINVAL if refused else 0)

    @precondition(lambda self: self.sending)
    @rule(data=st.data(), offset=OFFSETS, payload=st.binary(min_size=30, max_size=300))
    def leave(self, data: st.DataObject, offset: int, payload: bytes) -> None:
        """In order, in the middle of a write, or after nonsense: nobody else sees anything of it."""
        place = data.draw(st.sampled_from(sorted(self.sending)))
        half = request(Command.WRITE, 0, data=payload)[:-1]
        with self.sending.pop(place) as wire:
            farewell = data.draw(st.sampled_from([request(Command.DISC), half, half[:20], b"\0" * 28, b""]))
            wire.send(farewell)

    @invariant()
    def alive(self) -> None:
        """No client can end the server."""
        assert self.server.process.running

    def _somebody(self, data: st.DataObject) -> Haggler:
        return self.sending[data.draw(st.sampled_from(sorted(self.sending)))]

    def _request(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b""
    ) -> bytes:
        self.cookie += 1
        return request(command, offset, length, cookie=self.cookie, flags=flags, data=data)

    def _error(self, wire: Haggler) -> int:
        """The error of the one reply that comes, which has no data."""
        if not wire.structured:
            simple = wire.simple_reply()
            assert simple.cookie == self.cookie
            return simple.error
        chunk = wire.chunks()[-1]
        assert chunk.cookie == self.cookie
        return chunk.error

    def _data(self, wire: Haggler, offset: int, length: int) -> bytes:
        """What a successful read returns."""
        if not wire.structured:
            simple = wire.simple_reply()
            assert (simple.cookie, simple.error) == (self.cookie, 0)
            return wire.receive(length)
        (chunk,) = wire.chunks()
        assert (chunk.cookie, chunk.payload[:8]) == (self.cookie, struct.pack(">Q", offset))
        return chunk.payload[8:]


def test_sessions_in_any_order_agree_with_a_byte_array(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    with nbdserve("-f", "raw", image, directory=tmp_path) as running:

        class OnOneServer(Sessions):
            server = running
            model = bytearray(SIZE)

        relaxed = settings(
            max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        )
        run_state_machine_as_test(OnOneServer, settings=relaxed)
        assert image.read_bytes() == OnOneServer.model
