"""The client's side of NBD, through libnbd: one connection, or one that is renewed when it is lost.

While connecting, what goes wrong is a ConnectError for the operator; afterwards it is an OSError with an
errno, as everywhere in the data path. Every request has a time limit, and any number of threads may have any
number of requests in flight.
"""

from nbdserve.client.dial import Target, Through
from nbdserve.client.export import Export
from nbdserve.client.pipeline import DEFAULT_TIMEOUT, Client, connect
from nbdserve.client.upstream import Fate, Upstream

__all__ = ["DEFAULT_TIMEOUT", "Client", "Export", "Fate", "Target", "Through", "Upstream", "connect"]
