"""The log of requests that a disk has failed: an operator must see it, and it must not flood the log."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from nbdserve.protocol.constants import Command, NbdError
from nbdserve.protocol.framing import Request

_LOG = logging.getLogger("nbdserve")

INTERVAL = 10.0
"""Seconds between two lines about one client's requests."""

_TOLD = {NbdError.EIO, NbdError.ENOMEM, NbdError.ENOSPC, NbdError.EPERM}
"""Other errors are between the client and what it asked for. EPERM: the disk has become read-only."""


class FailureLog:
    """One line for the first failure, and at most one for all that follow within INTERVAL. Thread-safe."""

    def __init__(self, export: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._export = export
        self._clock = clock
        self._lock = threading.Lock()
        self._quiet_until = clock()
        self._untold = 0

    def tell(self, request: Request, error: NbdError, message: str) -> None:
        """A request of this client was answered with an error."""
        if error not in _TOLD:
            return
        with self._lock:
            now = self._clock()
            if now < self._quiet_until:
                self._untold += 1
                return
            self._quiet_until, untold, self._untold = now + INTERVAL, self._untold, 0
        _LOG.warning(
            "export %r: %s of %d bytes at %d fails with %s: %s%s",
            self._export,
            Command(request.command).name.lower().replace("_", " "),
            request.length,
            request.offset,
            error.name,
            message,
            f" (and {untold} more since the last such line)" if untold else "",
        )
