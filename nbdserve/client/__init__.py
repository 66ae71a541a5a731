"""The client's side of NBD, through libnbd: one connection, or one that is renewed when it is lost.

While connecting, what goes wrong is a ConnectError for the operator; afterwards it is an OSError with an
errno, as everywhere in the data path. Every request has a time limit, and any number of threads may have any
number of requests in flight.

What needs libnbd is imported when it is asked for: whoever only dials sockets does without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nbdserve.client.dial import Target, Through

if TYPE_CHECKING:
    from nbdserve.client.export import Export
    from nbdserve.client.pipeline import DEFAULT_TIMEOUT, Client, connect
    from nbdserve.client.upstream import Fate, Upstream

__all__ = ["DEFAULT_TIMEOUT", "Client", "Export", "Fate", "Target", "Through", "Upstream", "connect"]

_MODULES = {
    "Export": "export",
    "DEFAULT_TIMEOUT": "pipeline",
    "Client": "pipeline",
    "connect": "pipeline",
    "Fate": "upstream",
    "Upstream": "upstream",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
