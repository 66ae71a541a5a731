"""The connections to one server that has the backing: some for guests, the others for streaming.

They do not come back by themselves: server.py connects again, with pauses, and shows every new session to
``accept`` before it is used. There failover.py compares the size, and identity.py some blocks with those of
before: another disk is refused.
"""

from __future__ import annotations

from typing import Protocol

from nbdserve.client import Client, Target
from nbdserve.client.pace import Pace
from nbdserve.client.reconnect import Connections

LOOK = 0.5
"""Seconds between two looks whether a server that says nothing is still to be waited for."""


class Server(Protocol):
    """The server whose connections they are: what those who use them tell it, from any thread."""

    @property
    def uri(self) -> Target: ...

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


class Session(Connections):
    """Connections to one server; more may come after the first.

    ``demand`` is for what a guest waits for, so that it never queues behind streaming.
    """

    def __init__(self, source: Server, first: Client) -> None:
        super().__init__(first)
        self.source = source
        self.demand = first

    def bulk(self) -> Client:
        """Take one of the connections for streaming, in turn."""
        bulk = self.clients[1:] or self.clients
        return bulk[next(self.turns) % len(bulk)]
