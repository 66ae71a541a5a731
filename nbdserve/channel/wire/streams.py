"""The streams of a channel: what is known of each one, and whose turn it is to send."""

from __future__ import annotations

from collections import deque


class Stream:
    """One end of a stream. For one thread; only the session changes what is here."""

    __slots__ = (
        "allowed",
        "credit",
        "deficit",
        "ended_here",
        "ended_there",
        "given_up",
        "limit",
        "number",
        "over",
        "queued",
        "ready",
        "taken",
        "window",
    )

    def __init__(self, number: int, window: int, limit: int) -> None:
        self.number = number
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
        self.deficit = 0
        """Bytes that may still be sent in this turn; less than none where the last piece was longer."""
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
    def carries_ram(self) -> bool:
        """Tell whether the connector has opened it, which opens those of RAM only."""
        return self.number % 2 == 1

    @property
    def may_send(self) -> bool:
        """Tell whether data may be sent now."""
        return self.ready and self.credit > 0 and not (self.ended_here or self.given_up or self.over)


QUANTUM = 256 << 10
"""Bytes that a stream sends in its turn, about."""


class Turns:
    """Whose turn it is to send: deficit round robin, in which who comes new goes first (RFC 8290's fq_codel).

    A stream that has nothing to send most of the time, as that of a guest which waits for what it reads,
    comes new each time, and so overtakes those that always have: nobody has to say which one that is. Those
    share alike, by bytes; but RAM has as much as all disks together, however many streams these have.
    """

    def __init__(self) -> None:
        self._new = deque[Stream]()
        self._old = deque[Stream]()

    def begin(self, stream: Stream) -> None:
        """A stream has something to send."""
        stream.ready = True
        self.queue(stream)

    def queue(self, stream: Stream) -> None:
        """Let a stream wait for its turn, if it may send and does not wait yet."""
        if stream.may_send and not stream.queued:
            stream.queued = True
            stream.deficit = QUANTUM
            self._new.append(stream)

    def next(self) -> Stream | None:
        """Return whose turn it is, of whom ``deficit`` is to be lessened; None where nobody may send."""
        while queue := self._new or self._old:
            stream = queue[0]
            if stream.may_send and stream.deficit > 0:
                return stream
            queue.popleft()
            if stream.may_send:
                stream.deficit += QUANTUM * (max(len(self._old), 1) if stream.carries_ram else 1)
                self._old.append(stream)
            elif queue is self._new and self._old:
                # Else one that is empty for a moment after each piece would be new for ever.
                self._old.append(stream)
            else:
                stream.queued = False
        return None

    @property
    def is_empty(self) -> bool:
        """Tell whether nobody waits for a turn."""
        return self.next() is None
