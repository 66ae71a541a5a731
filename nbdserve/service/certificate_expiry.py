"""Certificates that expire while the server runs: the log says so ahead, and when it has happened."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from nbdserve.common.pem import Dates, Validity, date_text
from nbdserve.common.threads import Thread

_LOG = logging.getLogger("nbdserve")

DAY = 86400.0
_UNITS = ((DAY, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_LOOK = 3600.0
"""Seconds between two looks at the clock, which somebody may set."""


def stages(dates: Dates) -> tuple[float, float, float]:
    """Tell when to say that a certificate will expire, when to say it again, and when it has expired.

    A month and a day ahead, or a tenth and a hundredth of its life where that is shorter; in seconds since
    the epoch.
    """
    life = dates.ends - dates.begins
    return dates.ends - min(30 * DAY, life / 10), dates.ends - min(DAY, life / 100), dates.ends


class Expiry:
    """What has been said of each certificate so far."""

    def __init__(self, validity: Validity) -> None:
        self._validity = validity
        self._said = [0] * len(validity)
        """How many of its stages are over."""

    def look(self, now: float) -> float:
        """Say what is due; returns the seconds until the next look."""
        ahead = [_LOOK]
        for index, (path, dates) in enumerate(self._validity):
            over = [stage for stage in stages(dates) if stage <= now]
            if len(over) > self._said[index]:
                self._said[index] = len(over)
                _tell(path, dates, now)
            ahead += [stage - now for stage in stages(dates) if stage > now]
        return min(ahead)


def _tell(path: Path, dates: Dates, now: float) -> None:
    what = f"{path}: the certificate of {dates.subject}"
    if now >= dates.ends:
        _LOG.error("%s has expired: new clients refuse it: renew it, and start the server again", what)
    else:
        _LOG.warning(
            "%s expires on %s, in %s: renew it", what, date_text(dates.ends), _span(dates.ends - now)
        )


def _span(seconds: float) -> str:
    for unit, name in _UNITS:
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return "a moment"


@contextlib.contextmanager
def watched(validity: Validity) -> Iterator[None]:
    """Look at the dates as long as the block lasts."""
    expiry, over = Expiry(validity), threading.Event()

    def watch() -> None:
        while not over.wait(expiry.look(time.time())):
            pass

    try:
        Thread(watch, "certificates").start()
    except OSError as error:
        _LOG.warning("nobody looks at the dates of the certificates: %s", error.strerror)
    try:
        yield
    finally:
        over.set()
