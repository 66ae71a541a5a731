"""Two sessions back to back: streams arrive whole, windows are kept to, and who comes new goes first."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserve.channel.wire.frames import (
    HEADER,
    MOST_DATA,
    Bye,
    Close,
    CloseReason,
    Control,
    Credit,
    Data,
    Done,
    End,
    Open,
    Ping,
    Ram,
    RamStatus,
    Reset,
    ResetReason,
    Type,
    encode,
)
from nbdserve.channel.wire.greeting import LEAST_WINDOW, Offer
from nbdserve.channel.wire.session import Role, Session
from nbdserve.channel.wire.streams import QUANTUM, Stream
from nbdserve.common.errors import ProtocolError

WINDOW = LEAST_WINDOW
BUFFER = 200 << 10
OFFER = Offer(WINDOW, 4, 15_000)


def data_frame(stream: int, data: bytes) -> bytes:
    """A frame of data."""
    return HEADER.pack(Type.DATA, stream, len(data)) + data


class Side:
    """One end with its streams: what each has still to send, and what has come on it."""

    def __init__(self, role: Role, offer: Offer = OFFER, other: Offer = OFFER) -> None:
        self.session = Session(role, offer, other)
        self.to_send = defaultdict[int, bytearray](bytearray)
        self.ending = set[int]()
        self.held = defaultdict[int, bytearray](bytearray)
        self.received = defaultdict[int, bytearray](bytearray)
        self.known = dict[int, Stream]()
        self.ended = set[int]()
        self.stopped = set[int]()
        self.told: list[object] = []

    def open(self) -> int:
        """Open a stream."""
        stream = self.session.open()
        self.known[stream.number] = stream
        return stream.number

    def write(self, number: int, data: bytes) -> None:
        """Have something to send."""
        self.to_send[number] += data
        self.session.begin(self.known[number])

    def end(self, number: int) -> None:
        """Send no more than what there is already."""
        self.ending.add(number)
        self.session.begin(self.known[number])

    def fill(self, size: int = BUFFER) -> bytes:
        """What is sent next."""
        buffer = memoryview(bytearray(size))
        return bytes(buffer[: self.session.fill(buffer, self._read)])

    def receive(self, data: bytes) -> None:
        """Take what has arrived."""
        for stream, frame in self.session.receive(memoryview(data)):
            match frame:
                case Data(number, piece):
                    self.held[number] += piece
                case Open(number):
                    assert stream is not None
                    self.known[number] = stream
                case End(number):
                    self.ended.add(number)
                case Reset(number, _, _):
                    self.stopped.add(number)
                case other:
                    self.told.append(other)

    def deliver(self, number: int, count: int) -> None:
        """Let who uses a stream take some of what came on it."""
        data = self.held[number][:count]
        del self.held[number][:count]
        self.received[number] += data
        self.session.took(self.known[number], len(data))

    def _read(self, stream: Stream, buffers: list[memoryview]) -> int | None:
        waiting = self.to_send[stream.number]
        if not waiting:
            return 0 if stream.number in self.ending else None
        before = len(waiting)
        for buffer in buffers:
            count = min(len(buffer), len(waiting))
            buffer[:count] = waiting[:count]
            del waiting[:count]
        return before - len(waiting)


def pair() -> tuple[Side, Side]:
    """A source and a destination."""
    return Side(Role.CONNECTOR), Side(Role.ACCEPTOR)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_streams_arrive_whole_within_their_windows_however_they_are_cut(seed: int) -> None:
    luck = random.Random(seed)
    a, b = pair()
    sent = {(end, number): bytearray() for end in (0, 1) for number in (1, 2, 4, 6)}
    numbers = [end.open() for end in (a, b, b, b)]
    assert numbers == [1, 2, 4, 6]
    ends, wires = (a, b), (bytearray(), bytearray())
    for each in ends:
        wires[ends.index(each)].extend(each.fill())
    for one in (0, 1):
        ends[1 - one].receive(bytes(wires[one]))
        wires[one].clear()
    for _ in range(400):
        which = luck.randrange(2)
        end, wire, other = ends[which], wires[which], ends[1 - which]
        match luck.randrange(5):
            case 0:
                number, data = luck.choice(numbers), luck.randbytes(luck.choice((1, 100, 70_000)))
                if number not in end.ending:
                    end.write(number, data)
                    sent[which, number] += data
            case 1:
                wire += end.fill(luck.choice((5000, BUFFER)))
            case 2:
                count = luck.randrange(1 + len(wire))
                other.receive(bytes(wire[:count]))
                del wire[:count]
            case 3:
                end.deliver(luck.choice(numbers), luck.randrange(2 * WINDOW))
            case 4 if luck.random() < 0.05:
                number = luck.choice(numbers)
                end.end(number)
        for each in ends:
            assert all(len(held) <= WINDOW for held in each.held.values())
            assert each.session.bound <= WINDOW * len(numbers)
    for end in ends:
        for number in numbers:
            end.end(number)
    for _ in range(2000):
        for which, (end, other) in enumerate(((a, b), (b, a))):
            wire = wires[which]
            wire += end.fill()
            other.receive(bytes(wire))
            wire.clear()
            for number in numbers:
                other.deliver(number, WINDOW)
        if not (a.session.streams or b.session.streams):
            break
    assert not a.session.streams
    assert not b.session.streams
    for which, other in ((0, b), (1, a)):
        for number in numbers:
            assert other.received[number] == sent[which, number]
            assert number in other.ended


def backlogged(disks: int) -> tuple[Side, Side, list[int]]:
    """A source that has far more RAM, and of each disk, to send than can be sent soon, and a destination."""
    big = Offer(1 << 30, 8, 15_000)
    a, b = Side(Role.CONNECTOR, other=big), Side(Role.ACCEPTOR, offer=big)
    numbers = [a.open(), *(b.open() for _ in range(disks))]
    a.receive(b.fill())
    b.receive(a.fill())
    for number in numbers:
        a.write(number, bytes(40 << 20))
    return a, b, numbers


def sent_before(a: Side, b: Side, number: int, data: bytes) -> int:
    """How many bytes of other streams go before these, of a stream that has them now."""
    before = {each: len(held) for each, held in b.held.items()}
    have = before.get(number, 0)
    a.write(number, data)
    while len(b.held[number]) < have + len(data):
        b.receive(a.fill(2 * (HEADER.size + MOST_DATA)))
    return sum(len(held) - before.get(each, 0) for each, held in b.held.items() if each != number)


def test_who_comes_new_overtakes_those_that_always_have_something_to_send() -> None:
    a, b, _ = backlogged(disks=2)
    for _ in range(20):
        b.receive(a.fill())
    demand = b.open()
    a.receive(b.fill())
    for _ in range(20):
        # A reply, whole: nothing goes before it but what the same buffer takes behind it.
        assert sent_before(a, b, demand, bytes(32 + (64 << 10))) <= 2 * MOST_DATA
        for _ in range(10):
            b.receive(a.fill())


def test_who_asks_again_at_once_does_not_keep_others_from_their_turn() -> None:
    a, b, (ram, disk) = backlogged(disks=1)
    greedy = b.open()
    a.receive(b.fill())
    for _ in range(300):
        if not a.to_send[greedy]:
            a.write(greedy, bytes(QUANTUM))
        b.receive(a.fill())
    assert a.to_send[ram]
    taken = [len(b.held[number]) for number in (ram, disk, greedy)]
    assert taken[2] <= 1.1 * taken[1] + 4 * QUANTUM


def test_ram_has_as_much_as_all_disks_together_which_take_turns() -> None:
    a, b, numbers = backlogged(disks=3)
    for _ in range(300):
        b.receive(a.fill())
    counts = [len(b.held[number]) for number in numbers]
    assert abs(counts[0] - sum(counts[1:])) <= 4 * QUANTUM
    assert max(counts[1:]) - min(counts[1:]) <= 2 * QUANTUM


def test_who_was_idle_does_not_catch_up_on_all_that_the_others_sent() -> None:
    a, b, (ram, *_) = backlogged(disks=0)
    streaming = b.open()
    a.receive(b.fill())
    for _ in range(100):
        b.receive(a.fill())
    a.write(streaming, bytes(40 << 20))
    before = len(b.held[ram])
    for _ in range(50):
        b.receive(a.fill())
    assert len(b.held[ram]) - before >= len(b.held[streaming]) - 2 * QUANTUM


def test_a_stream_without_credit_waits_and_others_do_not() -> None:
    a, b = pair()
    one, other = b.open(), b.open()
    a.receive(b.fill())
    a.write(one, bytes(3 * WINDOW))
    b.receive(a.fill())
    assert len(b.held[one]) == WINDOW
    assert not a.session.has_to_send
    a.write(other, b"more")
    b.receive(a.fill())
    assert b.held[other] == b"more"
    b.deliver(one, WINDOW)
    a.receive(b.fill())
    b.receive(a.fill())
    assert len(b.held[one]) == WINDOW


def test_more_streams_than_agreed_are_not_opened_here_and_are_refused_there() -> None:
    a, b = pair()
    for _ in range(OFFER.streams):
        b.open()
    with pytest.raises(OSError, match="4 streams are open"):
        b.open()
    a.receive(b.fill())
    for number in list(b.known):
        b.session.finish(b.known[number])
        a.session.finish(a.known[number])
    b.receive(a.fill())
    a.receive(b.fill())
    assert not a.session.streams
    # Over, but not delivered there yet.
    more = b.open()
    a.receive(b.fill())
    assert more not in a.known
    b.receive(a.fill())
    assert b.stopped == {more}
    a.receive(b.fill())
    assert not a.session.streams
    for stream in a.known.values():
        a.session.release(stream)
    again = b.open()
    a.receive(b.fill())
    assert again in a.known


@pytest.mark.parametrize("ended", [(), ("a",), ("b",), ("a", "b")])
@pytest.mark.parametrize("resets", [("a",), ("b",), ("a", "b")])
def test_a_reset_is_over_at_both_ends_whatever_crosses_it(
    ended: tuple[str, ...], resets: tuple[str, ...]
) -> None:
    a, b = pair()
    number = b.open()
    a.receive(b.fill())
    ends = {"a": a, "b": b}
    for end, other in ((a, b), (b, a)):
        end.write(number, bytes(WINDOW))
        other.receive(end.fill())
    for name in ended:
        ends[name].session.finish(ends[name].known[number])
    for name in resets:
        ends[name].write(number, b"crosses")
        ends[name].deliver(number, WINDOW)
        ends[name].session.give_up(ends[name].known[number], ResetReason.BROKEN, "why")
    for _ in range(3):
        from_a, from_b = a.fill(), b.fill()
        a.receive(from_b)
        b.receive(from_a)
    assert not a.session.streams
    assert not b.session.streams


def test_silence_is_filled_with_pings_and_ends_in_death() -> None:
    a, b = pair()
    for _ in range(5):
        a.session.look(1.0)
    asked = a.fill()
    assert asked == encode(Ping(1))
    for _ in range(14):
        b.session.look(1.0)
    b.fill()
    assert not b.session.is_dead
    b.receive(asked)
    for _ in range(14):
        b.session.look(1.0)
    assert not b.session.is_dead
    b.session.look(1.0)
    assert b.session.is_dead


def test_who_was_stopped_for_an_hour_does_not_take_others_for_dead() -> None:
    a, _ = pair()
    a.session.look(3600.0)
    assert not a.session.is_dead


def test_control_comes_from_the_right_end_only() -> None:
    a, b = pair()
    b.session.say(Ram(RamStatus.LOADED))
    b.session.say(Done())
    a.receive(b.fill())
    a.session.say(Bye())
    b.receive(a.fill())
    assert a.told == [Ram(RamStatus.LOADED), Done()]
    assert b.told == [Bye()]


def test_nothing_is_sent_behind_a_close() -> None:
    a, b = pair()
    number = b.open()
    a.receive(b.fill())
    a.write(number, b"data")
    a.session.say(Close(CloseReason.STOPPED, "enough"))
    a.session.say(Bye())
    b.receive(a.fill())
    assert a.fill() == b""
    assert b.told == [Close(CloseReason.STOPPED, "enough")]


WRONG: dict[str, tuple[Role, list[Control | bytes]]] = {
    "data before a stream": (Role.CONNECTOR, [data_frame(2, b"x")]),
    "end of no stream": (Role.CONNECTOR, [End(2)]),
    "credit of no stream": (Role.CONNECTOR, [Credit(2, 1)]),
    "reset of no stream": (Role.CONNECTOR, [Reset(2, ResetReason.BROKEN)]),
    "our own number": (Role.CONNECTOR, [Open(1)]),
    "a number left out": (Role.CONNECTOR, [Open(4)]),
    "a number twice": (Role.CONNECTOR, [Open(2), Open(2)]),
    "two ends": (Role.CONNECTOR, [Open(2), End(2), End(2)]),
    "data behind the end": (
        Role.CONNECTOR, [Open(2), End(2), data_frame(2, b"x")]),
    "more data than granted": (
        Role.CONNECTOR,
        [Open(2), data_frame(2, bytes(WINDOW)), data_frame(2, b"x")]),
    "more credit than the window": (Role.CONNECTOR, [Open(2), Credit(2, 1)]),
    "an answer to nothing": (
        Role.CONNECTOR, [Open(2), Reset(2, ResetReason.ANSWER)]),
    "bye from the acceptor": (Role.CONNECTOR, [Bye()]),
    "done from the connector": (Role.ACCEPTOR, [Done()]),
    "RAM's end from the connector": (Role.ACCEPTOR, [Ram(RamStatus.LOADED)]),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_the_specification_forbids_ends_the_connection(what: str) -> None:
    role, frames = WRONG[what]
    sent = [frame if isinstance(frame, bytes) else encode(frame) for frame in frames]
    end = Side(role)
    end.receive(b"".join(sent[:-1]))
    with pytest.raises(ProtocolError, match="channel: "):
        end.receive(sent[-1])


def test_who_asks_for_ever_and_takes_no_answers_is_not_kept_answers_for() -> None:
    a, _ = pair()
    questions = encode(Ping(1)) * 100_000
    with pytest.raises(ProtocolError, match="takes no answers"):
        a.receive(questions)


def test_who_opens_streams_that_are_refused_and_does_not_answer_is_stopped() -> None:
    a, _ = pair()
    opening = b"".join(encode(Open(number)) for number in range(2, 100, 2))
    with pytest.raises(ProtocolError, match="more streams are opened"):
        a.receive(opening)
