"""The requests that a connection has under way, and when its server has been silent for too long.

The limit is on silence, not on how long an answer takes: as long as bytes move nothing is late, however slow
the link is. One that is passed over again and again while others are answered is late, too.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_LOOK = 5.0
"""Seconds between two looks at a connection on which nothing moves, at most."""
_OFTEN = 0.1
"""Seconds between two looks for requests that are passed over, while bytes move."""


class Promise(Future[T]):
    """What a request will have brought: nobody can call it back, as it is on its way."""

    def cancel(self) -> bool:
        """Refuse."""
        return False


class Request(Generic[T]):
    """A request in flight. ``result`` yields what its Future is to return, once it has succeeded."""

    # Of the class until they change, as most requests are answered before that.
    number = 0
    sent = 0.0
    overtaken = math.inf
    """Since when later ones are answered before it."""
    rounds = 0
    """How often one that was sent after it had been overtaken was answered before it."""
    next_round = 0
    """The number from which on requests make another round."""

    def __init__(self, result: Callable[[], T]) -> None:
        self.future: Promise[T] = Promise()
        self.result = result

    def succeed(self, name: str) -> None:
        """The server with this name has done it."""
        try:
            result = self.result()
        except OSError as error:
            self.future.set_exception(OSError(error.errno, f"{name}: {error.strerror}"))
        except Exception as error:  # noqa: BLE001 - whoever waits for it must be told
            what = f"{name}: its answer could not be taken: {error!r}"
            self.future.set_exception(OSError(errno.ENOMEM, what))
        else:
            self.future.set_result(result)


class Flight:
    """What is under way on one connection.

    ``silence`` is for how many seconds nothing may come or go while something is under way.

    Safe for several threads: the lock is held for moments only, and no other is taken under it.
    """

    def __init__(self, silence: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.silence = silence
        self._clock = clock
        self.look = min(_LOOK, silence)
        """Seconds between two looks at a connection on which nothing moves."""
        self._lock = threading.Lock()
        # In the order in which they were sent.
        self._requests: dict[Request[Any], None] = {}
        self._number = 0
        self._moved = clock()
        # Of the connection's own thread alone.
        self._has_moved = False
        self._due = self._moved

    def begin(self, request: Request[Any]) -> None:
        """A request is about to be sent."""
        with self._lock:
            self._number += 1
            request.number, request.sent = self._number, self._clock()
            self._requests[request] = None

    def end(self, request: Request[Any]) -> bool:
        """It is over; False if that was known already."""
        with self._lock:
            if request not in self._requests:
                return False
            del self._requests[request]
            oldest = next(iter(self._requests), None)
            if oldest is not None and oldest.number < request.number:
                self._overtake(oldest, request)
            return True

    def end_all(self) -> list[Request[Any]]:
        """All are over; those of which that was not known."""
        with self._lock:
            requests, self._requests = list(self._requests), {}
            return requests

    def moved(self) -> None:
        """Something came or went."""
        self._moved = self._clock()
        self._has_moved = True

    @property
    def quiet(self) -> float:
        """Tell for how many seconds nothing has moved although something is under way; 0 if nothing is."""
        with self._lock:
            return self._quiet(next(iter(self._requests), None))

    def seconds_to_look(self) -> float:
        """Tell when to look again, whatever is sent meanwhile. TimeoutError, ETIMEDOUT, if one is late.

        Cheap while bytes move, as it is asked for each answer.
        """
        has_moved, self._has_moved = self._has_moved, False
        if has_moved and self._moved < self._due:
            return self.look
        self._due = self._clock() + _OFTEN
        with self._lock:
            oldest = next(iter(self._requests), None)
            quiet = self._quiet(oldest)
        if quiet >= self.silence:
            raise TimeoutError(errno.ETIMEDOUT, f"no answer within {self.silence:g} s")
        if oldest is not None and oldest.rounds and self._clock() - oldest.overtaken >= self.silence:
            text = f"a request was passed over for {self.silence:g} s while others were answered"
            raise TimeoutError(errno.ETIMEDOUT, text)
        return min(self.look, self.silence - quiet)

    def _quiet(self, oldest: Request[Any] | None) -> float:
        return 0.0 if oldest is None else max(0.0, self._clock() - max(self._moved, oldest.sent))

    def _overtake(self, oldest: Request[Any], answered: Request[Any]) -> None:
        if oldest.overtaken == math.inf:
            oldest.overtaken, oldest.next_round = self._clock(), self._number
        elif answered.number > oldest.next_round:
            oldest.rounds, oldest.next_round = oldest.rounds + 1, self._number


class Window:
    """Requests of one user that are under way, ``most`` at a time, each with what must stay until it is done.

    What fails is raised when its turn comes to be waited for. For one thread.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._under_way: deque[tuple[Future[None], object]] = deque()

    def make_room(self) -> None:
        """Wait until one more may be begun. Raises OSError."""
        self._settle(self._most - 1)

    def add(self, request: Future[None], kept: object = None) -> None:
        """Have one more, for which there is room."""
        self._under_way.append((request, kept))

    def drain(self) -> None:
        """Wait for all of them. Raises OSError."""
        self._settle(0)

    def _settle(self, left: int) -> None:
        while len(self._under_way) > left:
            self._under_way.popleft()[0].result()
