"""A bounded pool of threads for requests that have to wait: for a network, or for a disk to flush."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

from nbdserve.common.threads import Thread

_LOG = logging.getLogger("nbdserve")
Task = Callable[[], None]


DEFAULT_MEMORY = 512 << 20
"""Bytes that the requests with the workers may hold, those of all clients together."""


IDLE = 30.0
"""Seconds for which a thread waits for another task before it ends."""


class Budget:
    """Bytes of memory that requests may hold, those of all clients together; maybe as a part of more."""

    def __init__(self, limit: int, whole: Budget | None = None) -> None:
        self._limit = limit
        self._whole = whole
        self._held = 0
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    def reserve(self, amount: int) -> None:
        """Wait, in the order of arrival, for so many bytes; more than the limit are granted alone."""
        with self._turn, self._changed:
            while self._held and self._held + amount > self._limit:
                self._changed.wait()
            self._held += amount
        if self._whole is not None:
            self._whole.reserve(amount)

    def release(self, amount: int) -> None:
        """Give them back."""
        if self._whole is not None:
            self._whole.release(amount)
        with self._changed:
            self._held -= amount
            self._changed.notify_all()

    def part(self, share: float) -> Budget:
        """Return so much of it at most, for those who leave the rest to others."""
        return Budget(int(share * self._limit), self)

    @property
    def held(self) -> int:
        """Tell how many bytes are reserved at this moment."""
        return self._held


class Workers:
    """At most ``limit`` threads, started when they are needed and ended after ``idle`` seconds without work.

    ``memory`` is what their requests may hold.

    A task deals with its own failures; one that does not is a defect, and ends in the log as a traceback.
    """

    def __init__(self, limit: int, memory: Budget | None = None, idle: float = IDLE) -> None:
        self.memory = memory or Budget(DEFAULT_MEMORY)
        self._limit = limit
        self._idle = idle
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        # All under the lock. Who takes a task counts it and itself, so that the counts are always true.
        self._threads = 0
        self._waiting = 0
        """Threads that look for a task."""
        self._queued = 0
        """Tasks that no thread has taken."""
        self._is_short = False
        """Whether the last attempt to start a thread has failed."""

    def submit(self, task: Task) -> None:
        """Run the task in one of the threads, soon; here and now where none is there nor can be started."""
        with self._lock:
            self._queued += 1
            if self._queued > self._waiting and self._threads < self._limit:
                self._start_thread()
            if self._threads:
                self._tasks.put(task)
                return
            self._queued -= 1
        self._perform(task)

    def close(self) -> None:
        """Let the threads end when they have nothing left to do."""
        with self._lock:
            for _ in range(self._threads):
                self._queued += 1
                self._tasks.put(None)

    def _start_thread(self) -> None:
        """Start one more, with the lock held, if the system has one."""
        try:
            Thread(self._work, "worker").start()
        except OSError as error:
            if not self._is_short:
                # The next request tries again.
                _LOG.warning("%d threads for requests that wait must do: %s", self._threads, error.strerror)
            self._is_short = True
        else:
            self._threads += 1
            self._is_short = False

    def _work(self) -> None:
        while (task := self._next()) is not None:
            self._perform(task)

    def _perform(self, task: Task) -> None:
        try:
            task()
        except MemoryError:
            _LOG.error("a request could not be finished: there is no memory left")
        except Exception:  # noqa: BLE001
            # The thread goes on, whatever the defect is: others count on it.
            _LOG.exception("a request could not be finished")

    def _next(self) -> Task | None:
        """The next task; None when the thread is to end, and is not counted any more."""
        with self._lock:
            self._waiting += 1
        while True:
            try:
                task = self._tasks.get(timeout=self._idle)
            except queue.Empty:
                with self._lock:
                    if self._queued < self._waiting:
                        # The others that wait are enough for what may have come at this very moment.
                        self._waiting -= 1
                        self._threads -= 1
                        return None
            else:
                with self._lock:
                    self._queued -= 1
                    self._waiting -= 1
                    if task is None:
                        self._threads -= 1
                return task


class Crew(NamedTuple):
    """The workers of an export: who waits for another server keeps nobody waiting who only needs the disk."""

    near: Workers
    far: Workers
    """For what needs the network."""


class Pools:
    """Workers for each export, so that a disk or a server that hangs keeps only its own clients waiting.

    They have at most ``limit`` threads near and far each, which end after ``idle`` seconds without work;
    ``memory`` is what the requests of all may hold
    together, of which those that need the network leave a quarter to the others.
    """

    def __init__(self, limit: int, memory: Budget, idle: float = IDLE) -> None:
        self._limit = limit
        self._idle = idle
        self._near, self._far = memory, memory.part(3 / 4)
        self._lock = threading.Lock()
        self._pools: weakref.WeakKeyDictionary[object, Crew] = weakref.WeakKeyDictionary()

    def of(self, export: object) -> Crew:
        """Return those of an export, for as long as it exists."""
        with self._lock:
            crew = self._pools.get(export)
            if crew is None:
                near, far = (Workers(self._limit, memory, self._idle) for memory in (self._near, self._far))
                crew = self._pools[export] = Crew(near, far)
            return crew

    def close(self) -> None:
        """Let all threads end when they have nothing left to do."""
        with self._lock:
            for crew in self._pools.values():
                for workers in crew:
                    workers.close()


class InFlight:
    """Counts the requests of one client that are with the workers, and the bytes of memory they hold."""

    def __init__(self, limit: int, byte_limit: int, memory: Budget) -> None:
        self._limit = limit
        self._byte_limit = byte_limit
        self._memory = memory
        self._count = 0
        self._bytes = 0
        self._changed = threading.Condition()

    def begin(self, size: int) -> None:
        """Count one more; waits while a limit is reached, which is the client's backpressure."""
        with self._changed:
            while not self._has_room(size):
                self._changed.wait()
            self._count += 1
            self._bytes += size
        self._memory.reserve(size)

    def end(self, size: int) -> None:
        """Count one less."""
        self._memory.release(size)
        with self._changed:
            self._count -= 1
            self._bytes -= size
            self._changed.notify_all()

    def _has_room(self, size: int) -> bool:
        if not self._count:
            return True
        return self._count < self._limit and self._bytes + size <= self._byte_limit

    def wait_until_none(self) -> None:
        """Wait until every request has been served."""
        with self._changed:
            self._changed.wait_for(lambda: self._count == 0)
