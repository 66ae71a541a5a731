"""A supervisor: the parent of one process, which ends with whoever holds the supervisor's standard input.

    nbd-migrate supervisor LOG READY COMMAND...

The process writes to the file LOG, and makes the file READY when it is ready (READY may be empty). The
supervisor reads words from its standard input, one a line:

    stop SECONDS    end the process: SIGTERM, and SIGKILL when it is still there after SECONDS
    release         from now on, end of file leaves the process alone
    leave           and then the supervisor ends, too; otherwise it stays with its process

and writes JSON objects to its standard output, one a line: ``{"started": PID}`` or ``{"failed": MESSAGE}``,
``{"ready": true}``, ``{"stopping": true}`` and ``{"released": true}`` when it has obeyed, and at the end
``{"exited": STATUS, "tail": TEXT}`` (a negative status is a signal) with the end of the log. To any other
word it says ``{"unknown": WORD}``. What a process that was killed has left of its file READY is removed
before.

In a migration the orchestrator and its guard hold the same pipe: when the orchestrator dies, the guard
decides what becomes of the process (migrate/guard.py, watch.py), and when both are dead, the end of file
does.

End of file without ``release`` ends the process, so a holder that is killed leaves no orphan; over ssh too,
as a lost connection is an end of file. Once it is released, whoever comes later may become its holder by the
supervisor's socket (named_socket.py, attach.py), with the same words and messages; the newest one counts.

The kernel's parent-death signal would do the same for the supervisor's own death, but it cannot be taken
back, and a released process carries a guest. So it is the holder's duty to end the process when its
supervisor dies before the release (recipes/processes/child.py does).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from nbdserve.common import standard_streams
from nbdserve.common.errors import OperatorError
from nbdserve.connection.accepting import ACCEPT_PAUSE
from nbdserve.service.pid_file import remove_abandoned
from recipes.processes.named_socket import listen, socket_beside

GRACE = 5.0
"""Seconds from SIGTERM to SIGKILL when the holder is gone."""

WORD = 256
"""Bytes that are kept of a word that has not come to its end."""

TAIL = 2000
"""Bytes of the log that are reported when the process ends."""

LONGEST = 86400.0
"""Seconds that a process may be given to end by itself."""

LOOK = 0.02
"""Seconds between two looks whether the process is ready."""


class Holder:
    """Who is listened to: the ends of a connection, or of standard input and output."""

    def __init__(self, connection: socket.socket | None = None) -> None:
        self._connection = connection
        self.words, self._messages = (connection.fileno(),) * 2 if connection else (0, 1)
        # Taken at once: later there may be no descriptors left.
        self._null = -1 if connection else os.open(os.devnull, os.O_RDWR)
        self._pending = b""
        self.listening = True

    def hear(self) -> list[str]:
        """Return what the holder says, words of one line each; nobody is heard any more when he has gone."""
        try:
            data = os.read(self.words, 4096)
        except BlockingIOError:
            return []
        except OSError:
            # There was none from the beginning, or he has gone with words that we said unread.
            data = b""
        self.listening = bool(data)
        *lines, pending = (self._pending + data).split(b"\n")
        # No word is so long.
        self._pending = pending[:WORD]
        return [line.decode(errors="replace") for line in lines]

    def tell(self, message: dict[str, object]) -> None:
        """Write one message for the holder, who may be gone."""
        with suppress(OSError):
            os.write(self._messages, json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Let go of him, so that he, or what leads to him, sees the end."""
        self.listening = False
        if self._connection:
            self._connection.close()
            self.words = self._messages = -1
            return
        if self._null < 0:
            return
        for number in (0, 1, 2):
            os.dup2(self._null, number)
        os.close(self._null)
        self._null = -1


class Supervisor:
    """One process and the holder that keeps it alive.

    ``held`` is closed when the first holder is let go of.
    """

    def __init__(self, log: Path, ready: Path | None, command: list[str], held: int) -> None:
        self._log = log
        self._ready = self._pid_file = ready
        self._held = held
        self._holder = Holder()
        self._listener: socket.socket | None = None
        self._name: tuple[int, ...] | None = None
        self._released = self._leaving = self._stopping = False
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
        """Serve until the process has ended, or until it is released and nobody needs us any more."""
        self._tell({"started": self._process.pid})
        pidfd = os.pidfd_open(self._process.pid)
        try:
            while not self._is_over(pidfd):
                pass
        finally:
            os.close(pidfd)
            self._unlisten()

    def _is_over(self, pidfd: int) -> bool:
        """Wait until something happens, and see to it; whether that was the last thing to do."""
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if self._holder.listening:
            poll.register(self._holder.words, select.POLLIN)
        if self._listener:
            poll.register(self._listener, select.POLLIN)
        happened = {fd for fd, _ in poll.poll(self._milliseconds_left())}
        self._look()
        if pidfd in happened:
            status = self._process.wait()
            self._remove_pid_file()
            # Who is told of the end finds nothing of us.
            self._unlisten()
            self._tell({"exited": status, "tail": self._tail()})
            return True
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._signal(signal.SIGKILL)
            self._deadline = None
        if self._holder.listening and self._holder.words in happened:
            for word in self._holder.hear():
                self._obey(word)
            if not self._holder.listening:
                return self._is_left()
        if self._listener and self._listener.fileno() in happened:
            self._welcome(self._listener)
        return False

    def _is_left(self) -> bool:
        """Tell whether nobody needs us any more, now that the holder has gone."""
        if self._stopping:
            return False
        if not self._released:
            self._stop(GRACE)
            return False
        if self._leaving or self._listener is None:
            return True
        self._let_go()
        return False

    def _let_go(self) -> None:
        """Close what leads to the holder, which may be a connection of ssh that waits for that."""
        self._holder.close()
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def _welcome(self, listener: socket.socket) -> None:
        """Somebody wants to be the holder. The one before may be behind a line that is dead."""
        try:
            connection, _ = listener.accept()
        except OSError:
            # For want of descriptors or memory; who waits is still there then.
            time.sleep(ACCEPT_PAUSE)
            return
        # A holder that takes no messages, as one that is stopped, is not waited for.
        connection.setblocking(False)
        self._let_go()
        self._holder, self._leaving = Holder(connection), False
        self._tell({"started": self._process.pid})
        self._tell({"released": True})

    def _obey(self, word: str) -> None:
        verb, _, argument = word.partition(" ")
        if verb == "release":
            self._released = True
            if self._listener is None:
                # Without it the process is found by its id.
                with suppress(OSError):
                    self._listener = listen(socket_beside(self._log))
                    self._name = identity(socket_beside(self._log))
            self._tell({"released": True})
        elif verb == "leave":
            self._leaving = True
        elif verb == "stop" and (seconds := seconds_of(argument)) is not None:
            self._stop(seconds)
            self._tell({"stopping": True})
        else:
            self._tell({"unknown": word})

    def _stop(self, seconds: float) -> None:
        self._stopping = True
        self._signal(signal.SIGTERM)
        self._deadline = time.monotonic() + seconds

    def _signal(self, number: signal.Signals) -> None:
        # The whole session, so that a server's own children end with it. It exists: nobody else can reap it.
        # One with the rights of another user, as sudo has, is left, and told of.
        with suppress(PermissionError):
            os.killpg(self._process.pid, number)

    def _tell(self, message: dict[str, object]) -> None:
        self._holder.tell(message)

    def _look(self) -> None:
        if self._ready and identity(self._ready) not in (None, self._before):
            self._ready = None
            self._tell({"ready": True})

    def _remove_pid_file(self) -> None:
        if self._pid_file and identity(self._pid_file) not in (None, self._before):
            with suppress(OSError, OperatorError):
                remove_abandoned(self._pid_file)

    def _unlisten(self) -> None:
        """Remove our socket, unless the name is another's by now."""
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None
        path = socket_beside(self._log)
        if identity(path) == self._name:
            path.unlink(missing_ok=True)

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


def seconds_of(text: str) -> float | None:
    """Return a number of seconds that can be waited for; None for anything else."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 <= seconds <= LONGEST else None


def identity(path: Path | None) -> tuple[int, ...] | None:
    """Return what tells a file from one that was there before: that may be another living process's."""
    try:
        status = os.stat(path) if path else None
    except OSError:
        return None
    return None if status is None else (status.st_dev, status.st_ino, status.st_mtime_ns)


def in_the_background() -> int:  # noqa: RET503 - execvp does not return
    """Go on in a child process, which whoever started us need not wait for once it has let go of him.

    Return what it has to close for that, or writes an exit code to before. The parent becomes a shell, which
    waits for nothing else.
    """
    watched, held = os.pipe()
    if os.fork() == 0:
        os.close(watched)
        return held
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(watched, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execvp("sh", ["sh", "-c", "read -r code; exit ${code:-0}"])


def main(arguments: list[str]) -> int:
    """Run the supervisor; return 0, or 1 when the command could not be started."""
    standard_streams.prepare()
    log, ready, *command = arguments
    # Only standard input ends a supervisor, not the terminal or the end of an ssh session. These are
    # handlers, as a process would inherit SIG_IGN.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    held = in_the_background()
    try:
        supervisor = Supervisor(Path(log), Path(ready) if ready else None, command, held)
    except OSError as error:
        Holder().tell({"failed": f"{error.filename or command[0]}: {error.strerror}"})
        os.write(held, b"1\n")
        return 1
    supervisor.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
