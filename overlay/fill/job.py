"""The state of the streaming job, and what the operator does to it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from enum import Enum

_LOG = logging.getLogger("nbd-overlay")


class Phase(Enum):
    """What the job is doing."""

    IDLE = "idle"
    """It was not started, or was cancelled."""
    RUNNING = "running"
    PAUSED = "paused"
    FAILED = "failed"
    """It cannot go on by itself; to resume it is to try again."""
    DONE = "done"
    """Everything is local."""


class OnError(Enum):
    """What becomes of a job that cannot go on; QEMU's names."""

    STOP = "stop"
    """It waits until it is resumed."""
    REPORT = "report"
    """It ends; what is here stays."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The job runs no more: paused, cancelled, or the process ends."""


class Job:
    """One job at a time.

    Safe for several threads. ``tell`` is called under the condition, so that phases are told in their order:
    it takes no lock that is held while this one is used, and waits for nothing.
    """

    def __init__(self) -> None:
        self.identifier = ""
        self.error: str | None = None
        """Why it failed; until it goes on, or is started again."""
        self.error_number: int | None = None
        """The errno of that, where it has one."""
        self._phase = Phase.IDLE
        self._ended = False
        self._changed = threading.Condition()
        self._on_error = OnError.STOP
        self.tell: Callable[[Phase], None] = lambda phase: None
        """Called with every new phase, in their order, in whichever thread brought it about; is quick."""

    @property
    def phase(self) -> Phase:
        """Return what it is doing now."""
        return self._phase

    def start(self, identifier: str, on_error: OnError = OnError.STOP) -> bool:
        """Run, from the idle state; False in any other."""
        with self._changed:
            if self._phase is Phase.IDLE:
                self.identifier, self._on_error = identifier, on_error
            return self._move({Phase.IDLE}, Phase.RUNNING)

    def pause(self) -> bool:
        """Rest until it is resumed; False if it does not run."""
        return self._move({Phase.RUNNING}, Phase.PAUSED)

    def resume(self) -> bool:
        """Go on, or try again; False if it is neither paused nor failed."""
        return self._move({Phase.PAUSED, Phase.FAILED}, Phase.RUNNING)

    def cancel(self) -> bool:
        """Give up; what is here stays. False if there is nothing to give up."""
        return self._move({Phase.RUNNING, Phase.PAUSED, Phase.FAILED}, Phase.IDLE)

    def complete(self) -> None:
        """Everything is local."""
        self._move(set(Phase), Phase.DONE)

    def fail(self, error: str, number: int | None = None) -> None:
        """It cannot go on: it waits, or ends, as was said at the start. What runs no more does not fail."""
        ends = self._on_error is OnError.REPORT
        self._move({Phase.RUNNING}, Phase.IDLE if ends else Phase.FAILED, error, number)

    def end(self) -> None:
        """The process ends."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_until_running(self) -> bool:
        """Wait until there is something to do; False when the process ends instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._phase is Phase.RUNNING)
            return not self._ended

    def pause_point(self, seconds: float = 0.0) -> None:
        """Rest for so many seconds, and raise Interrupted if the job is not to go on."""
        if seconds:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._phase is not Phase.RUNNING, seconds)
        if self._ended or self._phase is not Phase.RUNNING:
            raise Interrupted

    def _move(
        self, origins: set[Phase], target: Phase, error: str | None = None, number: int | None = None
    ) -> bool:
        with self._changed:
            if self._phase not in origins:
                return False
            self._phase, self.error, self.error_number = target, error, number
            self._changed.notify_all()
            try:
                self.tell(target)
            except Exception as error:  # noqa: BLE001 - who listens must not keep the job from going on
                _LOG.error("nobody could be told that the job is %s: %r", target.value, error)
            return True
