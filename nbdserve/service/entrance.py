"""A Unix socket whose clients are handed on, as they are, to who carries them elsewhere.

At the destination of a channel (nbdserve/channel/) these are clients of the source's disks, who need not know
of it; at the source it is QEMU that migrates.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Callable

from nbdserve.common.errors import reason_of
from nbdserve.common.threads import Thread
from nbdserve.connection.accepting import ACCEPT_PAUSE, AcceptFailures
from nbdserve.connection.listeners import Listener

_LOG = logging.getLogger("nbdserve")


class Entrance:
    """Accepts clients; ``adopt`` takes each, or raises OSError and has closed it.

    A client who comes while there is nobody to carry him is hung up on, as one whose connection is lost: to
    come again is the client's own business.
    """

    def __init__(self, listener: Listener, adopt: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._adopt = adopt
        self._failures = AcceptFailures()
        self._trouble = ""
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = Thread(self._run, "entrance")

    def start(self) -> None:
        """Accept from now on. OSError when there are no threads."""
        self._thread.start()

    def close(self) -> None:
        """Accept nobody any more."""
        os.eventfd_write(self._bell, 1)
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self._bell)
        self._listener.close()

    def _run(self) -> None:
        poll = select.poll()
        for fd in (self._bell, self._listener.sock.fileno()):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._bell in ready:
                return
            self._accept()

    def _accept(self) -> None:
        try:
            visitor = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            if self._failures.is_news(error):
                _LOG.warning("%s: cannot accept anybody: %s", self._listener, reason_of(error))
            time.sleep(ACCEPT_PAUSE)
            return
        try:
            self._adopt(visitor.sock)
            self._trouble = ""
        except OSError as error:
            # Who is hung up on comes again and again.
            known, self._trouble = self._trouble, reason_of(error)
            if self._trouble != known:
                _LOG.warning("%s: hung up on a client: %s", self._listener, self._trouble)
