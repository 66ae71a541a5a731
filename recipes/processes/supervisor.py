"""A supervisor: the parent of one process, which ends with whoever holds the supervisor's standard input.

    nbd-migrate supervisor LOG READY COMMAND...

The process writes to the file LOG, and makes the file READY when it is ready (READY may be empty). The
supervisor reads words from its standard input, one a line:

    stop SECONDS    end the process: SIGTERM, and SIGKILL when it is still there after SECONDS
    release         from now on, end of file on standard input leaves the process alone

and writes JSON objects to its standard output, one a line: ``{"started": PID}`` or ``{"failed": MESSAGE}``,
``{"ready": true}``, ``{"stopping": true}`` and ``{"released": true}`` when it has obeyed, and at the end
``{"exited": STATUS, "tail": TEXT}`` (a negative status is a signal) with the end of the log. What a process
that was killed has left of its file READY is removed before.

End of file without ``release`` ends the process, so a holder that is killed leaves no orphan; over ssh too,
as a lost connection is an end of file. The kernel's parent-death signal would do the same for the
supervisor's own death, but it cannot be taken back, and a released process carries a guest. So it is the
holder's duty to end the process when its supervisor dies before the release (recipes/processes/child.py
does).
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from nbdserve.common import standard_streams
from nbdserve.common.errors import OperatorError
from nbdserve.service.pid_file import remove_abandoned

GRACE = 5.0
"""Seconds from SIGTERM to SIGKILL when the holder is gone."""

TAIL = 2000
"""Bytes of the log that are reported when the process ends."""

LOOK = 0.02
"""Seconds between two looks whether the process is ready."""


class Supervisor:
    """One process and the standard input that keeps it alive."""

    def __init__(self, log: Path, ready: Path | None, command: list[str]) -> None:
        self._log = log
        self._ready = self._pid_file = ready
        self._released = False
        self._stopping = False
        self._deadline: float | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        self._before = identity(ready)
        with log.open("ab", buffering=0) as output:
            self._log_start = output.tell()
            # A session of its own: a Ctrl-C in the holder's terminal must not reach a guest.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def run(self) -> None:
        """Serve until the process has ended, or until it is released and the holder has gone."""
        tell({"started": self._process.pid})
        pidfd = os.pidfd_open(self._process.pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(0, select.POLLIN)
        pending = b""
        while True:
            ready = [fd for fd, _ in poll.poll(self._milliseconds_left())]
            self._look()
            if pidfd in ready:
                status = self._process.wait()
                self._remove_pid_file()
                tell({"exited": status, "tail": self._tail()})
                return
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._signal(signal.SIGKILL)
                self._deadline = None
            if 0 in ready:
                data = heard()
                *words, pending = (pending + data).split(b"\n")
                for word in words:
                    self._obey(word.decode(errors="replace"))
                if not data:
                    poll.unregister(0)
                    if not self._stopping:
                        if self._released:
                            return
                        self._stop(GRACE)

    def _obey(self, word: str) -> None:
        verb, _, argument = word.partition(" ")
        if verb == "release":
            self._released = True
            tell({"released": True})
        elif verb == "stop":
            self._stop(float(argument))
            tell({"stopping": True})

    def _stop(self, seconds: float) -> None:
        self._stopping = True
        self._signal(signal.SIGTERM)
        self._deadline = time.monotonic() + seconds

    def _signal(self, number: signal.Signals) -> None:
        # The whole session, so that a server's own children end with it. It exists: nobody else can reap it.
        # One with the rights of another user, as sudo has, is left, and told of.
        with suppress(PermissionError):
            os.killpg(self._process.pid, number)

    def _look(self) -> None:
        if self._ready and identity(self._ready) not in (None, self._before):
            self._ready = None
            tell({"ready": True})

    def _remove_pid_file(self) -> None:
        if self._pid_file and identity(self._pid_file) not in (None, self._before):
            with suppress(OSError, OperatorError):
                remove_abandoned(self._pid_file)

    def _milliseconds_left(self) -> float | None:
        waits = [LOOK] if self._ready else []
        if self._deadline is not None:
            waits.append(max(0.0, self._deadline - time.monotonic()))
        return min(waits) * 1000 if waits else None

    def _tail(self) -> str:
        with self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - TAIL))
            return log.read(TAIL).decode(errors="replace")


def identity(path: Path | None) -> tuple[int, ...] | None:
    """What tells a file from one that was there before: that may be another living process's."""
    try:
        status = os.stat(path) if path else None
    except OSError:
        return None
    return None if status is None else (status.st_dev, status.st_ino, status.st_mtime_ns)


def heard() -> bytes:
    """What the holder says; nothing when it has gone, or when there was none from the beginning."""
    try:
        return os.read(0, 4096)
    except OSError:
        return b""


def tell(message: dict[str, object]) -> None:
    """Write one message for the holder, who may be gone."""
    with suppress(OSError):
        os.write(1, json.dumps(message).encode() + b"\n")


def main(arguments: list[str]) -> int:
    """Run the supervisor; return 0, or 1 when the command could not be started."""
    standard_streams.prepare()
    log, ready, *command = arguments
    # Only standard input ends a supervisor, not the terminal or the end of an ssh session. These are
    # handlers, as a process would inherit SIG_IGN.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    try:
        supervisor = Supervisor(Path(log), Path(ready) if ready else None, command)
    except OSError as error:
        tell({"failed": f"{error.filename or command[0]}: {error.strerror}"})
        return 1
    supervisor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
