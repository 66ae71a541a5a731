"""What a client has under way that changes its disk: that alone its successor has to wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nbdserve.common.errors import ConnectionLostError


class Changes:
    """The writes, trims and zeroings of one client that have begun and are not over.

    Its connection's own thread makes one at a time, workers make others. After ``stop`` none begins any more,
    and ``over`` is called, by whichever thread, when one of those that had begun is over.
    """

    def __init__(self, over: Callable[[], None]) -> None:
        self.stopped = False
        """Whether no change begins any more: another client uses the disk now."""
        self._over = over
        self._own = False
        self._lock = threading.Lock()
        self._handed = 0

    @property
    def under_way(self) -> bool:
        """Tell whether one has begun and is not over; after ``stop`` never again. From any thread."""
        return self._own or self._handed > 0

    def stop(self) -> None:
        """Let no change begin any more. From any thread."""
        self.stopped = True

    def require(self) -> None:
        """Raise ConnectionLostError when no change may begin any more."""
        if self.stopped:
            raise ConnectionLostError(
                "the client went away in the middle of a change; another uses the disk now"
            )

    def begin(self) -> bool:
        """The connection's own thread is about to change the disk, until ``end``; returns True.

        ConnectionLostError when it must not any more. Cheap, as the hot loop calls it: whoever stops the
        changes looks at this flag after setting his, and here it is the other way round.
        """
        self._own = True
        if self.stopped:
            self.end()
            self.require()
        return True

    def end(self) -> bool:
        """It does not any more, for now; returns False. May be called again."""
        self._own = False
        if self.stopped:
            self._over()
        return False

    @contextmanager
    def one(self) -> Iterator[None]:
        """The connection's own thread changes the disk in the block."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def hand_over(self) -> None:
        """A worker is going to make one, until ``done``; ConnectionLostError when it must not any more."""
        with self._lock:
            self._handed += 1
        if self.stopped:
            self.done()
            self.require()

    def done(self) -> None:
        """A worker has made one, or not begun it."""
        with self._lock:
            self._handed -= 1
        if self.stopped:
            self._over()
