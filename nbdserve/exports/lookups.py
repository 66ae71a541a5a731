"""Look-ups that may hang, as in a file system whose server is away: who waits for them, and for how long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar

from nbdserve.common.threads import fulfil

MOST = 64
"""Look-ups that may be under way at a time."""

T = TypeVar("T")


class TooLateError(Exception):
    """A look-up has not come to an end in time, and goes on; or so many do that no other is begun."""


class Lookups:
    """One look-up at a time for each name, in a thread of its own; who asks meanwhile waits for the same.

    Nobody waits for longer than ``patience`` seconds. The look-up itself cannot be ended: a file system that
    hangs costs a thread for each name, however many clients ask for it, and however often.
    """

    def __init__(self, patience: float, most: int = MOST) -> None:
        self.patience = patience
        self._most = most
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[Any]] = {}

    def get(self, name: str, look: Callable[[], T], patience: float | None = None) -> T:
        """Return what ``look`` returns, or raises; TooLateError when that is not known in time.

        ``patience`` is for how many seconds this one waits, if not as all.
        """
        with self._lock:
            found: Future[T] | None = self._under_way.get(name)
            begins = found is None
            if found is None:
                if len(self._under_way) >= self._most:
                    raise TooLateError
                found = self._under_way[name] = Future()
        if begins:
            fulfil(found, f"look up {name}", partial(self._look, name, look))
        if not wait((found,), self.patience if patience is None else patience).done:
            raise TooLateError
        return found.result()

    def _look(self, name: str, look: Callable[[], T]) -> T:
        try:
            return look()
        finally:
            # Who asks from now on has it looked up anew.
            with self._lock:
                del self._under_way[name]
