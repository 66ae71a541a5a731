"""What reconnecting to a server takes, for a proxy (upstream.py) as for an overlay (overlay/backing/).

They share whose fault a failed request is, how long to pause and to dial, and connections that stand and fall
together. Two things differ on purpose:

- Who connects. A proxy's requests do, the first of them for all, as each knows for how long it may wait, and
  none may be sent before what the loss means for acknowledged writes is known. An overlay has a thread for
  each server, as one may be lost while guests are served by another.
- What the same disk is. A proxy's disk is written to, by others too, so only its size is compared. What is
  under an overlay does not change: some of its blocks are compared as well (overlay/backing/identity.py).
"""

from __future__ import annotations

import errno
import itertools
import threading
import time
from collections.abc import Callable
from enum import Enum, auto

from nbdserve.client.export import Export
from nbdserve.client.pipeline import Client
from nbdserve.common.errors import ConnectError, OperatorError

DIAL_TIMEOUT = 5.0
"""Seconds in which a server must take a connection, and for which it may be silent until it is made."""
_GONE = (errno.ENOTCONN, errno.ETIMEDOUT, errno.ESHUTDOWN)
"""What says that the connection is the trouble. Only the last comes over the wire."""


class Fault(Enum):
    """What is at fault where a request to a server has failed."""

    REQUEST = auto()
    """The server cannot do what it was asked, as it says itself: another may."""
    CONNECTION = auto()
    """It is lost, late or shutting down, and of no more use: the request may be repeated on another."""
    SERVER = auto()
    """It broke the protocol: nothing that it says counts any more."""


def fault_of(error: OSError) -> Fault:
    """Say what the error of a Client's request means; see Client for its errors."""
    if error.errno == errno.EPROTO:
        return Fault.SERVER
    return Fault.CONNECTION if error.errno in _GONE else Fault.REQUEST


class Dialler:
    """Connects to one server, with more time after it was silent, as it may take long to open its disk.

    ``dial`` connects within the seconds that it is given: at first ``first``, twice as many each time that
    they were not enough, up to ``longest``. For one thread at a time.
    """

    def __init__(
        self, dial: Callable[[float], Client], *, longest: float, first: float = DIAL_TIMEOUT
    ) -> None:
        self._dial = dial
        self._limit = first
        self._longest = longest

    def connect(self) -> Client:
        """Make a connection; raises what ``dial`` does."""
        began = time.monotonic()
        try:
            client = self._dial(self._limit)
        except (OperatorError, OSError):
            if time.monotonic() - began >= self._limit:
                self._limit = min(2 * self._limit, self._longest)
            raise
        self._limit = DIAL_TIMEOUT
        return client


class Connections:
    """Connections to one export that stand and fall together; more may come after the first.

    Safe for several threads: the lock is held for moments only, so that none is left open that is added while
    all are being closed. Only :meth:`close` waits, for at most two seconds.
    """

    def __init__(self, first: Client) -> None:
        self.clients: tuple[Client, ...] = (first,)
        self.turns = itertools.count()
        """Counts those who take one connection after the other."""
        self._lock = threading.Lock()
        self._closed = False

    @property
    def export(self) -> Export:
        """Return what the server says of the disk."""
        return self.clients[0].export

    @property
    def connected(self) -> bool:
        """Tell whether all of them still stand, as far as is known."""
        return all(client.connected for client in self.clients)

    @property
    def quiet(self) -> float:
        """Tell for how many seconds nothing has moved although something is asked for; 0 if nothing is."""
        return max(client.quiet for client in self.clients)

    def add(self, client: Client) -> None:
        """Use this connection, too; it is closed at once if the others are.

        Raises ConnectError, with it closed, where its disk has another size than that of the first.
        """
        size, found = self.export.size, client.export.size
        if found != size:
            client.close()
            raise ConnectError(f"{client.uri}: told another size: {size} bytes, then {found}")
        with self._lock:
            if not self._closed:
                self.clients += (client,)
                return
        client.close()

    def close(self) -> None:
        """Hang up. May be called again."""
        with self._lock:
            self._closed = True
        # Each takes leave for up to a second from a server that hangs: at the same time.
        for client in self.clients:
            client.hang_up()
        for client in self.clients:
            client.close()
