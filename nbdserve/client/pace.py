"""How much one request asks a server for: so much that its answer takes about a second on a slow link.

Short answers show early that a slow server is alive, let others have their turn, and are little to lose. But
where each request takes its time however short it is, long ones get more done. So the length is found by
trying: it is doubled while that costs little, and halved where that helps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_QUICK, _SLOW = 0.25, 1.5
"""Seconds that an answer may take: up to the first longer ones are asked for, from the second on shorter."""
_AIM = 1.0
"""Seconds that an answer should take on a slow link."""
_HARDLY_LONGER = 1.4
"""How many times as long an answer of twice the length takes, at most, where length is not what costs."""
_WEIGHT = 4
"""Measurements of which an average is made."""


class Pace:
    """The lengths of requests to one server, powers of two times ``shortest``, and its rate.

    Lengths are in bytes; ``first`` is the length of the first requests. Safe for several threads.
    """

    def __init__(
        self, shortest: int, first: int, longest: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lengths = [shortest << i for i in range((longest // shortest).bit_length())]
        self._now = self._lengths.index(first)
        self.clock = clock
        self._lock = threading.Lock()
        self._seconds: dict[int, float] = {}
        """What an answer of a length takes when it has the link to itself, by number of the length."""
        self._free = 0.0
        """When the link was last known to have brought something to its end."""
        self._typical = 0.0
        self._bytes = self._busy = 0.0
        """What came, and the seconds that it took, older ones counting less and less."""

    @property
    def length(self) -> int:
        """Tell how many bytes a request should ask for."""
        return self._lengths[self._now]

    @property
    def room(self) -> int:
        """Tell how many bytes who reads on should have under way: less before an answer so long has come."""
        return self.length * (2 if self._now in self._seconds else 1)

    @property
    def shortest(self) -> int:
        """Tell how many bytes a request asks for at least, unless no more are wanted."""
        return self._lengths[0]

    @property
    def longest(self) -> int:
        """Tell how many bytes a request ever asks for."""
        return self._lengths[-1]

    @property
    def seconds(self) -> float:
        """Return what an answer took lately, without the time that it waited behind others."""
        return self._typical

    @property
    def is_slow(self) -> bool:
        """Tell whether answers take so long that their length matters."""
        return self._typical > _QUICK

    @property
    def rate(self) -> float:
        """Return the bytes a second that answers came with lately; 0 if there were none."""
        return self._bytes / self._busy if self._busy else 0.0

    def answered(self, length: int, sent: float) -> None:
        """A request of so many bytes, sent at this time of the clock, has been answered."""
        with self._lock:
            now = self.clock()
            # What was sent behind others has the link only when they have been answered.
            took = max(1e-6, now - max(sent, self._free))
            self._free = now
            self._bytes += length - self._bytes / _WEIGHT
            self._busy += took - self._busy / _WEIGHT
            self._typical += (took - self._typical) / _WEIGHT if self._typical else took
            if length == self.length:
                before = self._seconds.get(self._now)
                self._seconds[self._now] = took if before is None else before + (took - before) / _WEIGHT
                self._choose()
            elif length < self.length and took >= _SLOW:
                self._doubt(length, took)

    def _doubt(self, length: int, took: float) -> None:
        """A short answer took long: is the link not any more what longer ones have shown?"""
        if took > _HARDLY_LONGER * self._seconds.get(self._now, 0.0):
            self._now = self._number_of(length)
            self._seconds = {self._now: took}

    def _number_of(self, length: int) -> int:
        """The longest of our lengths that is no longer than this one; the shortest if there is none."""
        return max(0, min(length // self._lengths[0], self._lengths[-1] // self._lengths[0]).bit_length() - 1)

    def _choose(self) -> None:
        number = self._now
        took, longer, shorter = (self._seconds.get(each) for each in (number, number + 1, number - 1))
        assert took is not None
        may_grow = number + 1 < len(self._lengths)
        if took <= _QUICK:
            self._now += may_grow
        elif took >= _SLOW and number and (shorter is None or shorter <= took / _HARDLY_LONGER):
            self._now = min(self._number_of(int(self.length / took * _AIM)), number - 1)
            # What is known of the others may have been measured when the link was another.
            self._seconds = {number: took}
        elif may_grow and (longer is None or longer <= took * _HARDLY_LONGER):
            self._now += 1


def timed(start: Callable[P, Future[T]], pace: Pace, length: int) -> Callable[P, Future[T]]:
    """Return what starts a request of so many bytes, and lets the pace learn how long its answer takes."""
    if length < pace.shortest:
        return start

    def begin(*args: P.args, **kwargs: P.kwargs) -> Future[T]:
        sent = pace.clock()
        future = start(*args, **kwargs)
        future.add_done_callback(lambda done: None if done.exception() else pace.answered(length, sent))
        return future

    return begin
