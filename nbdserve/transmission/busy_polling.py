"""Waiting for a client's next request: awake for a moment, where that pays, and asleep after it.

To put a thread to sleep and to wake it up again takes more time than a small request, on both sides. So who
has just served a client that asks for one thing after the other looks out for its next request, for no
longer than waking up would have taken. The kernel's SO_BUSY_POLL and KVM's halt polling do the same.
"""

from __future__ import annotations

import os
import select
import socket
import time

MOMENT = 50e-6
"""Seconds to stay awake, unless the operator says otherwise."""
LONGEST = 0.001
"""The most that may be asked for in seconds."""


class Watch:
    """What the clients of a server share: ``moment`` in seconds, 0 for never, and whose turn it was last."""

    def __init__(self, moment: float = MOMENT) -> None:
        # With one processor the client cannot send while we look.
        self.moment = moment if len(os.sched_getaffinity(0)) > 1 else 0.0
        self.last: BusyPolling | None = None


class BusyPolling:
    """The wait for one client's requests. ``begin`` comes before each receive, and ``end`` after it.

    It stays awake only if the wait before was short, and while no other client is served: threads that are
    awake for nothing would take the interpreter from those that work.
    """

    def __init__(self, sock: socket.socket, watch: Watch) -> None:
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._watch = watch
        self._began = 0.0
        self._pays = False

    def begin(self) -> None:
        """Return when there is something to receive, or when it is better to sleep until there is."""
        watch, ready, clock = self._watch, self._poll.poll, time.perf_counter
        self._began = now = clock()
        if self._pays:
            sleep_at = now + watch.moment
            while watch.last is self and now < sleep_at and not ready(0):
                now = clock()

    def end(self) -> None:
        """Something was received; one that had to be woken up has waited for that as well."""
        self._watch.last = self
        self._pays = time.perf_counter() - self._began < 2 * self._watch.moment
