"""Who is connected: in the order of arrival, still haggling or using an export."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from nbdserve.common.errors import ConnectionLostError
from nbdserve.exports.served_exports import Export
from nbdserve.transmission.unfinished_writes import Changes

SILENCE = 0.1
"""Seconds that every client has to answer the greeting, also when others wait to come in."""
GRACE = 1.0
"""Seconds that every client that answers has to choose an export, also when others wait to."""
PATIENCE = 30.0
"""Seconds that the work of a client that has gone is waited for; then its successor is refused."""


class Client(Protocol):
    """A connected client."""

    export: Export | None
    """What it uses; None while it is haggling."""
    host: str | None
    """Its host's address, if it came over IP."""
    changes: Changes
    """What it has under way that changes the disk."""

    @property
    def silent_for(self) -> float:
        """Tell for how many seconds it has left the greeting unanswered; 0 if it has not. From any thread."""

    def has_gone(self) -> bool:
        """Tell whether its end of the connection is closed. May be called from any thread."""


C = TypeVar("C", bound=Client)


class Clients(Generic[C]):
    """The clients of a server. ``changed`` is called, in any thread, when one has shaken hands or leaves."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._condition = threading.Condition()
        self._threads: dict[C, threading.Thread] = {}
        self._haggling: dict[C, float] = {}
        # Who may still have something to do, and the exports whose disks it may not change any more.
        self._working: dict[C, set[str]] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._threads)

    def add(self, client: C, thread: threading.Thread) -> None:
        """Add a new client, which the thread is going to serve."""
        with self._condition:
            self._threads[client] = thread
            self._haggling[client] = time.monotonic()
            self._working[client] = set()

    def handshake_over(self, client: C) -> None:
        """The client's handshake is over."""
        with self._condition:
            self._haggling.pop(client, None)
        self._changed()

    def discount(self, client: C) -> None:
        """The client was cut off while it haggled: it keeps no place, even if its thread is stuck."""
        with self._condition:
            self._haggling.pop(client, None)

    def finish(self, client: C) -> None:
        """Nothing that the client asked for is still to be done; it is only left to close the connection."""
        with self._condition:
            self._haggling.pop(client, None)
            self._working.pop(client, None)
            self._condition.notify_all()

    def remove(self, client: C) -> None:
        """The client is gone, and its thread is about to end."""
        self.finish(client)
        with self._condition:
            self._threads.pop(client, None)
        self._changed()

    def everyone(self) -> dict[C, threading.Thread]:
        """Return all clients and their threads at this moment, in the order of arrival."""
        with self._condition:
            return dict(self._threads)

    @property
    def haggling(self) -> int:
        """Tell how many have not chosen an export yet."""
        return len(self._haggling)

    def who_gives_way(self) -> tuple[C, float] | None:
        """Tell which of those that haggle goes first where there are too many, and in how many seconds.

        It is one from the host that most come from: there the oldest of those who have not even answered
        the greeting, which takes a round trip, or else the one who has taken the longest to choose.
        """
        with self._condition:
            arrivals = dict(self._haggling)
        crowd = Counter(client.host for client in arrivals)
        most = max(crowd.values(), default=0)
        crowded = [client for client in arrivals if crowd[client.host] == most]
        for client in crowded:
            if seconds := client.silent_for:
                return client, max(0.0, SILENCE - seconds)
        for client in crowded:
            return client, max(0.0, GRACE - (time.monotonic() - arrivals[client]))
        return None

    def wait_for_predecessors(self, newcomer: C) -> None:
        """Let changes end that were begun by those who came before, use the same export and have gone since.

        One of them may be the newcomer itself on its former connection: a write that it sent there must not
        land on a newer one that it sends here. So those begin no others, whatever they have sent, and what
        they read keeps nobody waiting. Raises ConnectionLostError when that takes too long, the server stops,
        or the newcomer itself has gone and another one has come meanwhile: it must not be served.
        """
        deadline = time.monotonic() + PATIENCE
        with self._condition:
            while self._supersedes(newcomer):
                left = deadline - time.monotonic()
                if self._closed:
                    raise ConnectionLostError("turned away: the server stops")
                if left <= 0:
                    raise ConnectionLostError(
                        f"turned away: a client that went away has kept export {_name(newcomer)} busy "
                        f"for {PATIENCE:g} s; look at the disk, then connect again"
                    )
                self._condition.wait(left)
            if _name(newcomer) in self._working[newcomer]:
                newcomer.changes.stop()
                newcomer.changes.require()

    def look_again(self) -> None:
        """The last change of a client that begins no other is over."""
        with self._condition:
            self._condition.notify_all()

    def close(self) -> None:
        """The server stops: nobody waits for others any more."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def _supersedes(self, newcomer: C) -> bool:
        """Whether a change is under way of one whom the newcomer succeeds; none of them begins another."""
        name, busy = _name(newcomer), False
        for client in itertools.takewhile(lambda client: client is not newcomer, self._working):
            if client.export not in (None, newcomer.export) or not client.has_gone():
                continue
            # Who haggles may be about to enter the same export, with its requests sent already.
            self._working[client].add(name)
            if client.export is not None:
                client.changes.stop()
                busy = busy or client.changes.under_way
        return busy


def _name(client: Client) -> str:
    return "?" if client.export is None else repr(client.export.name)
