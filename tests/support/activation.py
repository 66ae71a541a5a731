"""nbdserve with sockets handed over to it, in the way of systemd."""

from __future__ import annotations

import fcntl
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.processes import Argument, Process
from tests.support.servers import NBDSERVE, fresh_path

# As systemd does it after the fork: the sockets from 3 on, and the id of the process that is to be replaced.
_HAND_OVER = """
import os, sys
descriptors, names, command = sys.argv[1].split(","), sys.argv[2], sys.argv[3:]
for index, descriptor in enumerate(descriptors):
    os.dup2(int(descriptor), 3 + index)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(descriptors)), LISTEN_FDNAMES=names)
os.execv(command[0], command)
"""


@contextmanager
def activated(
    arguments: Sequence[Argument], directory: Path, *sockets: socket.socket, names: str = ""
) -> Iterator[Process]:
    """The server with these sockets; it may not be ready yet, but clients can connect."""
    with ExitStack() as stack:
        # Out of the way of the numbers that they are going to have.
        high = [fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, 100) for sock in sockets]
        for descriptor in high:
            stack.callback(socket.close, descriptor)
        listed = ",".join(map(str, high))
        command = [sys.executable, "-c", _HAND_OVER, listed, names, NBDSERVE, *arguments]
        log = fresh_path(directory, "activated", ".log")
        yield stack.enter_context(Process(command, log, pass_fds=high))
