"""Going to the background with python-daemon."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import daemon

from nbdserve.common.errors import OperatorError
from nbdserve.common.program import EXIT_FAILED

_FULL = "no process for the background can be started: look at ulimit -u, systemd's TasksMax and memory"


class Background:
    """The daemon's side of ``--fork``. ``ready`` lets the command that the operator typed return."""

    def __init__(self, announce: int) -> None:
        self._announce: int | None = announce

    def ready(self) -> None:
        """Make the waiting command exit with 0, and let go of its standard error."""
        self._tell(0)
        # Whoever reads the command's output must see its end.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stderr.fileno())
        os.close(null)

    def give_up(self, exit_code: int) -> None:
        """Make the waiting command exit with this code, if it still waits."""
        if self._announce is not None:
            self._tell(exit_code)

    def _tell(self, exit_code: int) -> None:
        assert self._announce is not None
        os.write(self._announce, bytes([exit_code]))
        os.close(self._announce)
        self._announce = None


@contextlib.contextmanager
def background(keep: list[int]) -> Iterator[Background]:
    """Go on in a daemon process; the calling process waits until the daemon is ready, or fails, and exits.

    ``keep`` are the descriptors that stay open, besides standard error, which the daemon gives up when it is
    ready. Enter it before any thread or child process is started.
    """
    answer, announce = os.pipe()
    try:
        child = os.fork()
    except OSError as error:
        raise OperatorError(_FULL) from error
    if child:
        os.close(announce)
        code = os.read(answer, 1)
        os._exit(code[0] if code else EXIT_FAILED)
    os.close(answer)
    context = daemon.DaemonContext(
        files_preserve=[announce, *keep],
        stderr=sys.stderr,
        umask=0o022,
        working_directory=os.getcwd(),
        detach_process=True,
        signal_map={},
    )
    try:
        context.open()
    except daemon.daemon.DaemonProcessDetachError as error:
        raise OperatorError(_FULL) from error
    daemon_side = Background(announce)
    try:
        yield daemon_side
    except OperatorError as error:
        daemon_side.give_up(error.exit_code)
        raise
