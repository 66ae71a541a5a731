"""Connections to one server that has the backing, which stand and fall together."""

from __future__ import annotations

import itertools
import threading
from typing import Protocol

from nbdserve.client import Client
from nbdserve.client.handle import Export
from nbdserve.client.pace import Pace
from nbdserve.common.uri import NbdUri


class Server(Protocol):
    """The server whose connections they are: what those who use them tell it, from any thread."""

    @property
    def uri(self) -> NbdUri: ...

    @property
    def pace(self) -> Pace: ...

    def answered(self, seconds: float) -> None:
        """A request was answered, after so many seconds."""

    def failed(self) -> None:
        """It could not do what it was asked."""

    def lost(self, session: Session) -> None:
        """These connections are out of order."""

    def distrust(self, session: Session, why: str) -> None:
        """What came is not what the protocol allows."""


class Session:
    """Connections to one server; more may come after the first.

    ``demand`` is for what a guest waits for, so that it never queues behind streaming.
    """

    def __init__(self, source: Server, first: Client) -> None:
        self.source = source
        self.demand = first
        self.clients: tuple[Client, ...] = (first,)
        self._turns = itertools.count()
        self._lock = threading.Lock()
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether all connections still stand, as far as is known."""
        return all(client.connected for client in self.clients)

    @property
    def quiet(self) -> float:
        """For how many seconds nothing has come although something is asked for; 0 if nothing is."""
        return max(client.quiet for client in self.clients)

    @property
    def export(self) -> Export:
        """What the server says of the disk."""
        return self.demand.export

    def bulk(self) -> Client:
        """One of the connections for streaming, in turn."""
        bulk = self.clients[1:] or self.clients
        return bulk[next(self._turns) % len(bulk)]

    def add(self, client: Client) -> None:
        """Use this connection, too; it is closed at once if the others are."""
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
