"""A bounded pool of threads for requests that have to wait: for a network, or for a disk to flush."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Task = Callable[[], None]


class Workers:
    """At most ``limit`` threads, started when they are needed.

    They are daemon threads: one that hangs in a dead disk does not keep the process from ending. A task deals
    with its own failures; one that does not ends in the log as a traceback, as in any thread.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0

    def submit(self, task: Task) -> None:
        """Run the task in one of the threads, soon."""
        with self._lock:
            if self._idle > 0:
                self._idle -= 1
            elif self._threads < self._limit:
                self._threads += 1
                threading.Thread(target=self._work, name="worker", daemon=True).start()
        self._tasks.put(task)

    def close(self) -> None:
        """Let the threads end when they have nothing left to do."""
        with self._lock:
            for _ in range(self._threads):
                self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            finally:
                with self._lock:
                    self._idle += 1


class InFlight:
    """Counts the requests of one client that are with the workers."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._changed = threading.Condition()

    def begin(self) -> None:
        """Count one more; waits while the limit is reached, which is the client's backpressure."""
        with self._changed:
            self._changed.wait_for(lambda: self._count < self._limit)
            self._count += 1

    def end(self) -> None:
        """Count one less."""
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait_until_none(self) -> None:
        """Wait until every request has been served."""
        with self._changed:
            self._changed.wait_for(lambda: self._count == 0)
