"""A socket of this host whose clients are led to another host: the end of a tunnel at which they arrive.

    nbd-migrate listen SOCKET OWNER MODE

OWNER and MODE are those of the socket, as nbdserve's --socket-owner and --socket-mode; they may be empty. The
first line that is written is a message: ``{"connected": true}``, or ``{"failed": REASON}``. What follows is
``{"accepted": NUMBER}`` for each client, which then belongs to who takes it (take.py) or drops it: a line
``drop NUMBER`` on our standard input; and ``{"waiting": REASON}`` when for a while nobody is accepted. End of
file ends everything.

A tunnel whose connection was cut makes another, while its old end may not know of that for hours: the new one
has the old one end first, by the socket beside this one (SOCKET.take), with all clients that it has led on.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from nbdserve.common import standard_streams
from nbdserve.common.errors import OperatorError
from nbdserve.common.ownership import ownership
from nbdserve.connection.accepting import ACCEPT_PAUSE, AcceptFailures
from nbdserve.connection.listeners import Listener, listen_unix
from recipes.connections.bridge import tell

WORD = 64
"""Bytes that one word of who takes a client may have."""

TAKE_OVER = 5.0
"""Seconds in which the end before us must have ended; one that hangs loses its socket all the same."""


def control_of(path: str) -> str:
    """Return the socket by which clients of another are taken."""
    return f"{path}.take"


def main(arguments: list[str]) -> int:
    """Listen until standard input ends; return 0, or 1 where that is not possible."""
    standard_streams.prepare()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    path, owner, mode = arguments
    with ExitStack() as stack:
        try:
            end_another(path)
            control = stack.enter_context(closing(listen_unix(control_of(path))))
            whose = ownership(mode or None, owner or None, "--socket-")
            listener = stack.enter_context(closing(listen_unix(path, whose)))
        except (OperatorError, OSError) as error:
            tell({"failed": " ".join(str(error).split())})
            return 1
        tell({"connected": True})
        with End(listener, control) as end:
            end.run()
    return 0


def end_another(path: str) -> None:
    """Have the end before us end, if there is one, and take its places. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as before:
        before.settimeout(TAKE_OVER)
        try:
            before.connect(control_of(path))
            before.sendall(b"end\n")
            before.recv(1)
        except (FileNotFoundError, ConnectionError):
            # What is dead gives way by itself.
            return
        except (TimeoutError, BlockingIOError):
            for each in (control_of(path), path):
                Path(each).unlink(missing_ok=True)


class End:
    """Clients that wait to be taken, and connections to those who have taken one."""

    def __init__(self, listener: Listener, control: Listener) -> None:
        self._places = (listener, control)
        self._listener = listener.sock
        self._control = control.sock
        self._waiting: dict[int, socket.socket] = {}
        self._takers: dict[int, socket.socket] = {}
        self._failures = AcceptFailures()
        self._count = 0
        self._said = b""

    def __enter__(self) -> End:
        return self

    def __exit__(self, *_: object) -> None:
        # The places first: another end waits for them.
        for place in self._places:
            place.close()
        for each in (*self._waiting.values(), *self._takers.values()):
            each.close()

    def run(self) -> None:
        """Accept until standard input ends, or another end takes our place."""
        poll = select.poll()
        for source in (0, self._listener, self._control):
            poll.register(source, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == 0 and not self._hear():
                    return
                if fd == self._listener.fileno():
                    self._accept()
                elif fd == self._control.fileno():
                    taker = self._serve()
                    if taker is None:
                        return
                    if taker >= 0:
                        poll.register(taker, select.POLLIN)
                elif fd in self._takers:
                    poll.unregister(fd)
                    self._takers.pop(fd).close()

    def _hear(self) -> bool:
        """Obey what comes from standard input; False at its end."""
        try:
            data = os.read(0, 4096)
        except OSError:
            return False
        *lines, self._said = (self._said + data).split(b"\n")
        for line in lines:
            verb, _, number = line.partition(b" ")
            if verb == b"drop" and number.isdigit() and int(number) in self._waiting:
                self._waiting.pop(int(number)).close()
        return bool(data)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError as error:
            self._pause(error)
            return
        self._count += 1
        self._waiting[self._count] = client
        with suppress(OSError):
            tell({"accepted": self._count})

    def _pause(self, error: OSError) -> None:
        """Nobody can be accepted, for want of descriptors perhaps: those who wait are there later, too."""
        if isinstance(error, BlockingIOError | ConnectionError):
            return
        if self._failures.is_news(error):
            with suppress(OSError):
                tell({"waiting": f"a client cannot be accepted: {error.strerror}"})
        time.sleep(ACCEPT_PAUSE)

    def _serve(self) -> int | None:
        """Give somebody a client; return what his end is noticed by, -1 if there is none, and None where it
        is another end that takes our place.
        """
        try:
            taker, _ = self._control.accept()
        except OSError as error:
            self._pause(error)
            return -1
        try:
            taker.settimeout(TAKE_OVER)
            verb, _, number = taker.recv(WORD).strip().partition(b" ")
            if verb == b"end":
                # Closed with the others.
                self._takers[taker.fileno()] = taker
                return None
            client = self._waiting.pop(int(number))
        except (OSError, ValueError, KeyError):
            taker.close()
            return -1
        with client, suppress(OSError):
            socket.send_fds(taker, [b"."], [client.fileno()])
        self._takers[taker.fileno()] = taker
        return taker.fileno()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
