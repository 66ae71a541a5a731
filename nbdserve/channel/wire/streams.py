"""The streams of a channel: their classes, what is known of each one, and whose turn it is to send."""

from __future__ import annotations

from collections import deque
from enum import IntEnum


class StreamClass(IntEnum):
    """What a stream carries, and so what overtakes it. The number is what goes over the wire."""

    DEMAND = 0
    """NBD for a guest that waits: goes before everything else."""
    RAM = 1
    """QEMU's migration stream, with its return path in the other direction."""
    STREAMING = 2
    """NBD in the background; shares what is left with RAM."""


class Stream:
    """One end of a stream. For one thread; only the session changes what is here."""

    __slots__ = (
        "allowed",
        "credit",
        "ended_here",
        "ended_there",
        "given_up",
        "kind",
        "limit",
        "number",
        "over",
        "queued",
        "ready",
        "taken",
        "window",
    )

    def __init__(self, number: int, kind: StreamClass, window: int, limit: int) -> None:
        self.number = number
        self.kind = kind
        self.window = window
        """Bytes that the other end may have sent without their being taken here."""
        self.limit = limit
        """The same of the other end."""
        self.allowed = window
        """Bytes that the other end may still send."""
        self.taken = 0
        """Bytes that were taken here and have not been granted again."""
        self.credit = limit
        """Bytes that may still be sent."""
        self.ready = False
        """Whether there is something to send, as far as is known."""
        self.queued = False
        self.ended_here = False
        self.ended_there = False
        self.given_up = False
        """A reset was sent, and has not been answered."""
        self.over = False
        """Nothing is sent or received any more."""

    @property
    def may_send(self) -> bool:
        """Tell whether data may be sent now."""
        return self.ready and self.credit > 0 and not (self.ended_here or self.given_up or self.over)


_AHEAD = 256 << 10
"""Bytes by which one who had nothing to send may be ahead of the other when it has again."""


class Turns:
    """Whose turn it is to send: demand before all, then RAM and streaming alike, by bytes.

    In each class the streams take turns.
    """

    def __init__(self) -> None:
        self._queues = {kind: deque[Stream]() for kind in StreamClass}
        self._sent = dict.fromkeys(StreamClass, 0)

    def begin(self, stream: Stream) -> None:
        """A stream that had nothing to send has."""
        if not stream.ready:
            stream.ready = True
            others = (self._sent[kind] for kind in StreamClass if kind is not StreamClass.DEMAND)
            self._sent[stream.kind] = max(self._sent[stream.kind], max(others) - _AHEAD)
        self.queue(stream)

    def queue(self, stream: Stream) -> None:
        """Let a stream wait for its turn, if it may send and does not wait yet."""
        if stream.may_send and not stream.queued:
            stream.queued = True
            self._queues[stream.kind].append(stream)

    def next(self) -> Stream | None:
        """Return whose turn it is, and let it wait no more; None where nobody may send."""
        while (queue := self._queue()) is not None:
            stream = queue.popleft()
            stream.queued = False
            if stream.may_send:
                return stream
        return None

    def sent(self, stream: Stream, count: int) -> None:
        """A stream has sent so many bytes."""
        self._sent[stream.kind] += count
        self.queue(stream)

    @property
    def is_empty(self) -> bool:
        """Tell whether nobody waits for a turn."""
        return self._queue() is None

    def _queue(self) -> deque[Stream] | None:
        if self._queues[StreamClass.DEMAND]:
            return self._queues[StreamClass.DEMAND]
        waiting = [kind for kind in (StreamClass.RAM, StreamClass.STREAMING) if self._queues[kind]]
        return self._queues[min(waiting, key=self._sent.__getitem__)] if waiting else None
