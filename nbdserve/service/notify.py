"""What systemd is told: that the server is ready, that it stops, and that it is alive (sd_notify(3))."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, MutableMapping

_LOG = logging.getLogger("nbdserve")


class Watchdog:
    """Calls ``report`` every ``interval`` seconds, by the hand of whoever proves by it to be alive."""

    def __init__(self, report: Callable[[], None] = lambda: None, interval: float | None = None) -> None:
        self._report = report
        self._interval = interval
        self._next = time.monotonic()

    def seconds_left(self) -> float | None:
        """Tell how long one may wait before the next ``beat``; None for ever."""
        return None if self._interval is None else max(0.0, self._next - time.monotonic())

    def beat(self) -> None:
        """Report, if it is time to."""
        if self._interval is not None and not self.seconds_left():
            self._next = time.monotonic() + self._interval
            self._report()


class ServiceManager:
    """The service manager that started this process, or nobody.

    What it said to this process is taken out of ``environment``: it does not concern its children.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        name = environment.pop("NOTIFY_SOCKET", "")
        asked = environment.pop("WATCHDOG_USEC", "")
        of_whom = environment.pop("WATCHDOG_PID", str(os.getpid()))
        self._sock = _connect(name) if name else None
        self.watchdog = Watchdog()
        if asked.isdecimal() and int(asked) and of_whom == str(os.getpid()):
            # Half of what is asked for, as sd_watchdog_enabled(3) advises.
            self.watchdog = Watchdog(lambda: self.tell("WATCHDOG=1"), int(asked) / 2e6)

    def descriptors(self) -> list[int]:
        """Return what must stay open when the process becomes a daemon."""
        return [] if self._sock is None else [self._sock.fileno()]

    def tell(self, *assignments: str) -> None:
        """Send assignments, such as ``READY=1``."""
        if self._sock is not None:
            try:
                self._sock.send("\n".join(assignments).encode())
            except OSError as error:
                _LOG.warning("cannot tell the service manager: %s", error.strerror or error)


def _connect(name: str) -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setblocking(False)
    try:
        sock.connect("\0" + name[1:] if name.startswith("@") else name)
    except OSError as error:
        # A server is worth more than the news about it.
        _LOG.warning("NOTIFY_SOCKET=%s: %s: nobody is told that this server is ready", name, error.strerror)
        sock.close()
        return None
    return sock
