"""Threads, of which a process may have no more: the one place that starts any, and how often they poll."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

LOOK = 0.01
"""Seconds between two looks of a thread at what tells nobody that it changes: another process's lock, a child
that starts, a socket that empties."""


class Thread(threading.Thread):
    """A daemon thread: one that hangs in a dead disk does not keep the process from ending."""

    def __init__(self, target: Callable[..., object], name: str, *arguments: object) -> None:
        super().__init__(target=target, args=arguments, name=name, daemon=True)

    def start(self) -> None:
        """Start it. OSError, ENOMEM, when there are no more threads to be had.

        The kernel's EAGAIN for that would become a BlockingIOError, which has another meaning to sockets.
        """
        try:
            super().start()
        except (RuntimeError, MemoryError) as error:
            raise OSError(
                errno.ENOMEM, "no thread can be started: look at ulimit -u, systemd's TasksMax and memory"
            ) from error


def promised(name: str, work: Callable[[], T]) -> Future[T]:
    """Return what a thread of its own does that may hang; it is done already where none could be started."""
    promise: Future[T] = Future()
    fulfil(promise, name, work)
    return promise


def fulfil(promise: Future[T], name: str, work: Callable[[], T]) -> None:
    """Let a thread of its own do what may hang, or this one where none can be started; tell the Future."""

    def perform() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001, whoever waits is told
            promise.set_exception(error)
        else:
            promise.set_result(result)

    # Nobody can call it back.
    promise.set_running_or_notify_cancel()
    try:
        Thread(perform, name).start()
    except OSError:
        perform()
