"""One connection of a channel, as values: streams, credits, what is sent next, and what came.

Nothing here does input or output: who uses it feeds what has arrived, and has buffers filled with what is to
be sent.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from enum import Enum, auto

from nbdserve.channel.wire.frames import (
    HEADER,
    MOST_DATA,
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
from nbdserve.channel.wire.greeting import Offer
from nbdserve.channel.wire.streams import QUANTUM, Stream, Turns
from nbdserve.common.errors import ProtocolError

_GRANTS = 8
"""How often what was taken is granted while a window passes: rarely, but long before the other end waits."""
_LEAST_ROOM = 4096
"""Bytes of data below which a frame waits for the next buffer."""
_MOST_CONTROL = 1 << 20
"""Bytes of frames other than data that may wait; more only where the other end takes none and sends many."""
_MOST_STREAM = (1 << 32) - 1
_PINGS = 3
"""How often an end that has nothing to send is heard of in the time after which it would be dead."""
_LONGEST_LOOK = 2.0
"""Seconds that count between two looks at most: who was stopped itself has not heard anybody."""

_LONGEST_INTERVAL = 1.0

Read = Callable[[Stream, list[memoryview]], int | None]
"""Reads what a stream is to send into buffers, the payloads of frames that follow each other: how many bytes,
0 at its end, None if there are none now."""


class Role(Enum):
    """Which end this is."""

    CONNECTOR = auto()
    """The source: opens the stream of RAM."""
    ACCEPTOR = auto()
    """The destination: opens streams of NBD, and says what has become of RAM."""


class Session:
    """What one end knows of a connection. For one thread.

    ``ours`` is what this end takes, ``theirs`` what the other end takes, as the greeting says.
    """

    def __init__(self, role: Role, ours: Offer, theirs: Offer) -> None:
        self.streams: dict[int, Stream] = {}
        """Those that are not over."""
        self.silent = 0.0
        """Seconds for which nothing was heard."""
        self.interval = min(_LONGEST_INTERVAL, ours.silence / 6000, theirs.silence / 6000)
        """Seconds after which ``look`` is to be called again."""
        self._role = role
        self._ours = ours
        self._theirs = theirs
        self._next_number = 1 if role is Role.CONNECTOR else 2
        self._next_of_theirs = 2 if role is Role.CONNECTOR else 1
        self._decoder = Decoder()
        self._turns = Turns()
        self._control = bytearray()
        self._quiet = 0.0
        # Of the streams that the other end opened, those of which something is still to be delivered here.
        self._places: set[int] = set()
        self._pings = 0
        self._closed = False

    # What is sent.

    def open(self) -> Stream:
        """Open a stream, the connector of RAM, the acceptor of NBD; OSError, EBUSY, where the other end takes
        no more.
        """
        own = sum(number % 2 == self._next_number % 2 for number in self.streams)
        if own >= self._theirs.streams or self._next_number > _MOST_STREAM:
            raise OSError(errno.EBUSY, f"{own} streams are open, and the other end takes no more")
        stream = self._add(self._next_number)
        self._next_number += 2
        self.say(Open(stream.number))
        return stream

    def begin(self, stream: Stream) -> None:
        """A stream has something to send, or its end."""
        self._turns.begin(stream)

    def finish(self, stream: Stream) -> None:
        """A stream has nothing more to send."""
        if not (stream.ended_here or stream.given_up or stream.over):
            stream.ended_here = True
            self.say(End(stream.number))
            self._look_whether_over(stream)

    def give_up(self, stream: Stream, reason: ResetReason, text: str = "") -> None:
        """Give a stream up, in both directions."""
        if not (stream.given_up or stream.over):
            stream.given_up = True
            self.say(Reset(stream.number, reason, text))

    def took(self, stream: Stream, count: int) -> None:
        """So many bytes of a stream were delivered here."""
        stream.taken += count
        if _GRANTS * stream.taken >= stream.window and not (
            stream.ended_there or stream.given_up or stream.over
        ):
            self.say(Credit(stream.number, stream.taken))
            stream.allowed += stream.taken
            stream.taken = 0

    def release(self, stream: Stream) -> None:
        """Nothing of a stream is kept here any more: another may take its place."""
        self._places.discard(stream.number)

    def say(self, frame: Control) -> None:
        """Send a frame as soon as possible, before all data; nothing after a Close."""
        if not self._closed:
            self._closed = isinstance(frame, Close)
            self._control += encode(frame)

    @property
    def has_to_send(self) -> bool:
        """Tell whether ``fill`` may have something."""
        return bool(self._control) or (not self._closed and not self._turns.is_empty)

    def fill(self, buffer: memoryview, read: Read) -> int:
        """Fill a buffer with what is to be sent next; returns how much that is."""
        at = 0
        while True:
            at += self._fill_control(buffer[at:])
            if self._control or self._closed or len(buffer) - at < HEADER.size + _LEAST_ROOM:
                break
            if (stream := self._turns.next()) is None:
                break
            payloads = _payloads(buffer[at:], min(stream.credit, QUANTUM))
            count = read(stream, payloads)
            if count is None:
                stream.ready = False
            elif count == 0:
                self.finish(stream)
            else:
                stream.credit -= count
                stream.deficit -= count
                at = _frame(buffer, at, stream.number, count)
        if at:
            self._quiet = 0.0
        return at

    def _fill_control(self, buffer: memoryview) -> int:
        count = min(len(self._control), len(buffer))
        buffer[:count] = self._control[:count]
        del self._control[:count]
        return count

    # What has arrived.

    def receive(self, data: memoryview) -> Iterator[tuple[Stream | None, Frame]]:
        """Yield what concerns who uses this, with the stream that it is about.

        That is Data, Open, End and Reset of streams, Ram, Done, Bye and Close. Pieces of data lie in the
        memory that is given, and are to be told by ``took`` when they are delivered. Raises ProtocolError.
        """
        self.silent = 0.0
        for frame in self._decoder.feed(data):
            match frame:
                case Data(number, piece):
                    stream = self._of(number, frame)
                    if self._may_receive(stream, len(piece)):
                        yield stream, frame
                case Credit(number, count):
                    self._grant(number, count)
                case Ping(value):
                    self._answer(Pong(value))
                case Pong(_):
                    pass
                case Open(number):
                    if (opened := self._opened(number)) is not None:
                        yield opened, frame
                case End(number):
                    stream = self._of(number, frame)
                    if self._may_end(stream):
                        yield stream, frame
                case Reset(number, reason, _):
                    if (stopped := self._reset(number, reason)) is not None:
                        yield stopped, frame
                case Ram(_) | Done():
                    self._require(Role.CONNECTOR, frame)
                    yield None, frame
                case Bye():
                    self._require(Role.ACCEPTOR, frame)
                    yield None, frame
                case Close(_, _):
                    yield None, frame

    @property
    def is_between_frames(self) -> bool:
        """Tell whether everything that arrived was whole."""
        return self._decoder.is_between_frames

    @property
    def bound(self) -> int:
        """Return how many bytes the other end may have sent on all streams undelivered. From any thread."""
        return sum(stream.window for stream in list(self.streams.values()))

    def look(self, seconds: float) -> None:
        """So many seconds have passed: let the other end hear of this one in time."""
        self.silent += min(seconds, _LONGEST_LOOK)
        self._quiet += seconds
        if self._quiet * _PINGS >= self._theirs.silence / 1000:
            self._quiet = 0.0
            self._pings += 1
            self.say(Ping(self._pings))

    @property
    def is_dead(self) -> bool:
        """Tell whether the other end was silent for longer than this one bears with."""
        return self.silent * 1000 >= self._ours.silence

    def _add(self, number: int) -> Stream:
        stream = Stream(number, self._ours.window, self._theirs.window)
        self.streams[number] = stream
        return stream

    def _of(self, number: int, frame: Frame) -> Stream:
        stream = self.streams.get(number)
        if stream is None:
            raise ProtocolError(
                f"channel: a frame {type(frame).__name__} for stream {number}, which is not open"
            )
        return stream

    def _was_open(self, number: int) -> bool:
        """Whether there was such a stream: what crosses its end on the way is ignored."""
        return number < (self._next_number if number % 2 == self._next_number % 2 else self._next_of_theirs)

    def _may_receive(self, stream: Stream, count: int) -> bool:
        if stream.given_up:
            return False
        if stream.ended_there:
            raise ProtocolError(f"channel: data behind the end of stream {stream.number}")
        stream.allowed -= count
        if stream.allowed < 0:
            raise ProtocolError(f"channel: more data on stream {stream.number} than was granted")
        return True

    def _grant(self, number: int, count: int) -> None:
        stream = self.streams.get(number)
        if stream is None:
            if not self._was_open(number):
                raise ProtocolError(f"channel: a credit for stream {number}, which is not open")
            return
        stream.credit += count
        if stream.credit > stream.limit:
            raise ProtocolError(f"channel: more credit for stream {number} than its window")
        self._turns.queue(stream)

    def _opened(self, number: int) -> Stream | None:
        if number != self._next_of_theirs:
            raise ProtocolError(f"channel: stream {number} is opened, {self._next_of_theirs} is the next")
        self._next_of_theirs += 2
        stream = self._add(number)
        if len(self._places) < self._ours.streams:
            self._places.add(number)
            return stream
        if sum(each.given_up for each in self.streams.values()) >= self._ours.streams:
            raise ProtocolError("channel: more streams are opened than the greeting allows")
        self.give_up(stream, ResetReason.REFUSED, f"{self._ours.streams} streams are open already")
        return None

    def _may_end(self, stream: Stream) -> bool:
        if stream.ended_there:
            raise ProtocolError(f"channel: stream {stream.number} ends twice")
        stream.ended_there = True
        self._look_whether_over(stream)
        return not stream.given_up

    def _reset(self, number: int, reason: ResetReason) -> Stream | None:
        """The stream that is over by a reset, if that is news."""
        stream = self.streams.get(number)
        if stream is None:
            if not self._was_open(number):
                raise ProtocolError(f"channel: a reset of stream {number}, which is not open")
            return None
        if not stream.given_up:
            if reason is ResetReason.ANSWER:
                raise ProtocolError(f"channel: the answer to a reset of stream {number} that was not sent")
            self._answer(Reset(number, ResetReason.ANSWER))
        known, stream.given_up = stream.given_up, True
        self._end(stream)
        return None if known else stream

    def _look_whether_over(self, stream: Stream) -> None:
        if stream.ended_here and stream.ended_there:
            self._end(stream)

    def _end(self, stream: Stream) -> None:
        stream.over = True
        del self.streams[stream.number]

    def _answer(self, frame: Control) -> None:
        if len(self._control) > _MOST_CONTROL:
            raise ProtocolError("channel: the other end asks, and takes no answers")
        self.say(frame)

    def _require(self, role: Role, frame: Frame) -> None:
        if self._role is not role:
            raise ProtocolError(f"channel: a frame {type(frame).__name__} comes from the wrong end")


def _payloads(buffer: memoryview, most: int) -> list[memoryview]:
    """Cut a buffer into payloads of frames that follow each other, with room for their headers between."""
    payloads = []
    at = HEADER.size
    while most > 0 and at < len(buffer):
        payload = buffer[at : at + min(MOST_DATA, most)]
        payloads.append(payload)
        most -= len(payload)
        at += len(payload) + HEADER.size
    return payloads


def _frame(buffer: memoryview, at: int, stream: int, count: int) -> int:
    """Write the headers before so many bytes that lie in payloads from ``at`` on; returns where they end."""
    while count:
        length = min(count, MOST_DATA)
        HEADER.pack_into(buffer, at, Type.DATA, stream, length)
        at += HEADER.size + length
        count -= length
    return at


__all__ = ["CloseReason", "RamStatus", "Read", "Role", "Session"]
