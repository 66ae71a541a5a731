"""Whom a server serves, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

from nbdserve.connection.allow_list import AllowList
from nbdserve.connection.handshake import Terms
from nbdserve.transmission.busy_polling import MOMENT
from nbdserve.transmission.workers import DEFAULT_MEMORY, IDLE


@dataclass(frozen=True)
class Policy:
    """Limits of the whole server, and the terms for each client."""

    shared: int = 0
    """Clients served at a time; more wait in the listen queue. 0 means no limit."""
    max_connections: int = 0
    """Clients connected at a time; more are turned away at once. 0 means no limit."""
    max_handshakes: int = 128
    """Clients that have not chosen an export yet; when one more comes the oldest of them is cut off."""
    request_memory: int = DEFAULT_MEMORY
    """Bytes that the requests with the workers may hold, those of all clients together."""
    stall: float = 60.0
    """Seconds of silence that end a client in the middle of a request, or that does not take its replies."""
    worker_idle: float = IDLE
    """Seconds for which a thread for requests that wait stays when there are none."""
    busy_poll: float = MOMENT
    """Seconds for which the next request of the one client that is active is looked out for, before sleep."""
    once: bool = False
    """End when the last client has gone."""
    timed: bool = False
    """Measure how long requests take."""
    allow: AllowList = field(default_factory=AllowList)
    terms: Terms = field(default_factory=Terms)
