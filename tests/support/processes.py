"""Child processes that cannot outlive the test run: started, waited for and ended under a time limit.

Every child is started through ``setpriv --pdeathsig KILL`` and writes its output to a file, so that a full
pipe can never stop it and the file can be shown when a test fails.

Tests name the seconds that an idle machine needs at most; all limits here are PATIENCE times as long.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

Argument = str | os.PathLike[str]
PATIENCE = 8.0
"""How much slower than an idle machine one may be on which others work, before a test gives up."""

_ACCEPTS = "00010000"
"""The flag of a listening socket in /proc/net/unix."""


def dying_with_parent(number: signal.Signals) -> list[str]:
    """The words before a command that let the kernel send it this signal when we die."""
    return ["setpriv", "--pdeathsig", number.name.removeprefix("SIG"), "--"]


class NotReadyError(AssertionError):
    """What a test waited for did not happen in time, or can no longer happen."""


def is_alive(pid: int) -> bool:
    """Whether a process runs, and is more than a zombie that its parent has not collected yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listens(path: Path) -> bool:
    """Whether a server listens on a Unix socket, found out without connecting.

    The socket's file is there a moment earlier, when it is bound; who connects then is refused.
    """
    rows = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines())
    return any(len(row) == 8 and row[3] == _ACCEPTS and row[7] == str(path) for row in rows)


def wait_until(
    condition: Callable[[], object], what: str, seconds: float = 10.0, interval: float = 0.01
) -> None:
    """Poll until the condition holds; NotReadyError says what was waited for when PATIENCE is at its end."""
    limit = seconds * PATIENCE
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise NotReadyError(f"waited {limit:g} s in vain: {what}")
        time.sleep(interval)


class Process:
    """A long-lived child: a server, a QEMU, a daemon. As a context manager it is killed at the end."""

    def __init__(
        self,
        argv: Sequence[Argument],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        pass_fds: Sequence[int] = (),
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        """Start the command with its output and errors appended to ``log``; ``env`` is added to our own.

        The kernel sends ``death_signal`` when the test run dies.
        """
        # The kernel sends the signal when the *thread* that forked ends, not when the process does.
        assert threading.current_thread() is threading.main_thread(), "start processes in the main thread"
        self.argv = [os.fspath(argument) for argument in argv]
        self.log = log
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                [*dying_with_parent(death_signal), *self.argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                pass_fds=pass_fds,
            )

    def __repr__(self) -> str:
        state = "running" if self.running else f"ended with {self._popen.returncode}"
        return f"<{' '.join(self.argv)}: {state}>"

    @property
    def pid(self) -> int:
        """The process id of the command itself (``setpriv`` replaces itself by it)."""
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._popen.poll() is None

    def output(self) -> str:
        """What the process has written so far, on both of its outputs."""
        return self.log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
        """Wait until the condition holds; NotReadyError, with the output, if it is late or the child ends."""

        def holds_or_ended() -> bool:
            return bool(condition()) or not self.running

        try:
            wait_until(holds_or_ended, what, seconds)
        except NotReadyError as error:
            raise NotReadyError(f"{error}\n{self!r}\n{self.output()}") from None
        if not condition():
            raise NotReadyError(f"{what} cannot happen any more: {self!r}\n{self.output()}")

    def wait_for_line(self, text: str, seconds: float = 10.0) -> None:
        """Wait until the output contains the text."""
        self.wait_for(lambda: text in self.output(), f"{text!r} in the output", seconds)

    def wait_for_pid_file(self, path: Path, seconds: float = 10.0) -> None:
        """Wait until the server has written its pid file, whole: the sign that it is ready for clients."""
        self.wait_for(lambda: path.exists() and path.read_text().endswith("\n"), f"pid file {path}", seconds)

    def wait(self, seconds: float = 10.0) -> int:
        """The exit code, negative for a signal; if time runs out the process is killed and the test fails."""
        limit = seconds * PATIENCE
        try:
            return self._popen.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise NotReadyError(f"did not end within {limit:g} s: {self!r}\n{self.output()}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, unless it has ended."""
        self._popen.send_signal(number)

    def freeze(self) -> None:
        """Stop the process by SIGSTOP; returns when each of its threads has stopped."""
        self.signal(signal.SIGSTOP)
        states = list(Path(f"/proc/{self.pid}/task").glob("*/stat"))
        wait_until(lambda: all(") T " in state.read_text() for state in states), f"{self!r} stops")

    def terminate(self, seconds: float = 10.0) -> int:
        """Send SIGTERM and return the exit code; the test fails when the process does not end in time."""
        self.signal(signal.SIGTERM)
        return self.wait(seconds)

    def kill(self) -> int:
        """Send SIGKILL and return the exit code."""
        self._popen.kill()
        return self._popen.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def run(
    *argv: Argument,
    seconds: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a short-lived command to its end and return it with its output, whatever its exit code."""
    return subprocess.run(
        [*dying_with_parent(signal.SIGKILL), *(os.fspath(argument) for argument in argv)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds * PATIENCE,
        env={**os.environ, **(env or {})},
        cwd=cwd,
    )


def check(*argv: Argument, seconds: float = 60.0, cwd: Path | None = None) -> str:
    """Run a command that must succeed and return its standard output; otherwise fail with all it wrote."""
    done = run(*argv, seconds=seconds, cwd=cwd)
    assert done.returncode == 0, f"{done.args} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
