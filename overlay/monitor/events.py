"""QEMU's events for what becomes of a block job, in QEMU's order."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from overlay.daemon import Daemon
from overlay.fill.job import Phase
from overlay.mirror.status import MirrorState

Emit = Callable[[str, Mapping[str, object]], None]
"""Tells everybody of an event, by its name and its data."""

STATUS = {
    Phase.RUNNING: "running",
    Phase.PAUSED: "paused",
    # As in QEMU a job that an error has stopped is a paused one with an io-status.
    Phase.FAILED: "paused",
    Phase.DONE: "concluded",
    Phase.IDLE: "null",
}
"""JobStatus, as far as a job is seen in it by who asks."""


class JobEvents:
    """Turns each new phase of the daemon's job into events."""

    def __init__(self, daemon: Daemon) -> None:
        self.emit: Emit = lambda event, data: None
        self._daemon = daemon
        self._before = daemon.job.phase

    def tell(self, phase: Phase) -> None:
        """The job is in this phase now."""
        job = self._daemon.job
        before, self._before = self._before, phase
        match phase:
            case Phase.RUNNING:
                self._status(job.identifier, *(["created"] if before is Phase.IDLE else []), "running")
            case Phase.PAUSED:
                self._status(job.identifier, "paused")
            case Phase.FAILED:
                self._error("stop")
                self._status(job.identifier, "paused")
            case Phase.IDLE if job.error:
                self._error("report")
                self._end(job.identifier, ["aborting"], "BLOCK_JOB_COMPLETED", {"error": job.error})
            case Phase.IDLE:
                self._end(job.identifier, ["aborting"], "BLOCK_JOB_CANCELLED")
            case Phase.DONE if before is not Phase.IDLE:
                self._end(job.identifier, ["waiting", "pending"], "BLOCK_JOB_COMPLETED")

    def tell_of_nothing_to_do(self, identifier: str) -> None:
        """A job was started that is complete at once. In QEMU, too, its length is 0."""
        self._status(identifier, "created", "running")
        nothing = {"len": 0, "offset": 0}
        self._end(identifier, ["waiting", "pending"], "BLOCK_JOB_COMPLETED", nothing)

    def tell_of_mirror(self, state: MirrorState, reason: str) -> None:
        """The mirror of the guest's writes follows, or does not, for a reason."""
        self.emit("OVERLAY_MIRROR", {"state": state.value, **({"reason": reason} if reason else {})})

    def _end(
        self, identifier: str, first: list[str], event: str, more: Mapping[str, object] | None = None
    ) -> None:
        done, total = self._daemon.progress.look()
        summary = {
            "type": "stream",
            "device": identifier,
            "len": total,
            "offset": done,
            "speed": self._daemon.streamer.limit.speed,
        }
        self._status(identifier, *first)
        self.emit(event, {**summary, **(more or {})})
        self._status(identifier, "concluded", "null")

    def _status(self, identifier: str, *statuses: str) -> None:
        for status in statuses:
            self.emit("JOB_STATUS_CHANGE", {"id": identifier, "status": status})

    def _error(self, action: str) -> None:
        device = self._daemon.job.identifier
        self.emit("BLOCK_JOB_ERROR", {"device": device, "operation": "read", "action": action})
