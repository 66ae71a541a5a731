"""Become the holder of a process whose supervisor has been left: its words are ours, its messages come here.

    nbd-migrate attach LOG

LOG is that of the process. Between standard input and output and the supervisor's socket everything is
passed on, until either ends. The first message is what a supervisor says at its beginning (supervisor.py);
where none listens, it is ``{"failed": MESSAGE}``, and a socket that one who was killed has left is removed.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from nbdserve.common import standard_streams
from recipes.connections.bridge import pass_on, tell
from recipes.processes.named_socket import connect, socket_beside


def main(arguments: list[str]) -> int:
    """Pass words and messages on; return 0, or 1 when there is no supervisor."""
    standard_streams.prepare()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    [log] = arguments
    path = socket_beside(Path(log))
    try:
        supervisor = connect(path)
    except OSError as error:
        if isinstance(error, ConnectionRefusedError):
            # Its supervisor was killed.
            path.unlink(missing_ok=True)
        tell({"failed": f"{path}: {error.strerror or error}"})
        return 1
    with supervisor:
        pass_on(supervisor)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
