"""Waiting for the end of ``nbdserve channel``: a signal, or whatever else is told."""

from __future__ import annotations

import contextlib
import signal
from queue import Empty, SimpleQueue

_LOOK = 0.5
"""Seconds within which a signal is noticed."""


class Ending:
    """What is waited for in the main thread, and told from any; signals tell it, too.

    It is no Event, as a signal may come while another one is handled, and would wait for its lock for ever.
    """

    def __init__(self) -> None:
        self._told = SimpleQueue[None]()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self.tell())

    def tell(self) -> None:
        """It is the end."""
        self._told.put(None)

    def wait(self) -> None:
        """Wait for it.

        A signal that comes just before a wait begins does not end that, as its handler runs behind it.
        """
        while True:
            with contextlib.suppress(Empty):
                self._told.get(timeout=_LOOK)
                return
