"""What the monitor of ``nbd-overlay serve`` can do: QEMU's block jobs, for the one job that there is."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator

from nbdserve.config import ImageOptions
from nbdserve.control import Control as ServerControl
from nbdserve.listeners import Listener
from nbdserve.qmp.commands import CommandError, Handler
from nbdserve.qmp.monitor import Monitor
from nbdserve.server import Server
from overlay.daemon import Daemon
from overlay.job import Phase

_LOG = logging.getLogger("nbd-overlay")

JOB = "stream"
"""What the job is called by who does not say."""
_LARGEST = (1 << 63) - 1
_STATUS = {
    Phase.RUNNING: "running",
    Phase.PAUSED: "paused",
    # As in QEMU a job that an error has stopped is a paused one with an io-status.
    Phase.FAILED: "paused",
    Phase.DONE: "concluded",
    Phase.IDLE: "null",
}
_ACTIVE = (Phase.RUNNING, Phase.PAUSED, Phase.FAILED)
_OF_SERVER = ("query-block-exports", "x-query-clients", "x-disconnect-client", "quit")


class Control:
    """The commands, with QEMU's names and answers where QEMU has them."""

    def __init__(self, server: Server, daemon: Daemon) -> None:
        self.server = ServerControl(server, ImageOptions())
        self._daemon = daemon
        self._job = daemon.job
        self.commands: dict[str, Handler] = {
            **{name: self.server.commands[name] for name in _OF_SERVER},
            "block-stream": self._block_stream,
            "query-block-jobs": self._query_block_jobs,
            "query-jobs": self._query_jobs,
            "block-job-set-speed": self._set_speed,
            "block-job-pause": self._pause,
            "block-job-resume": self._resume,
            "block-job-cancel": self._cancel,
            "query-overlay": self._query_overlay,
            "overlay-activate": self._activate,
            "overlay-invalidate": self._invalidate,
        }

    def _block_stream(
        self,
        device: str = "",
        job_id: str | None = None,
        speed: int | None = None,
        on_error: str = "stop",
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        """Stream everything. The device is whatever the caller calls the disk: there is only one."""
        if on_error != "stop":
            raise CommandError(f"Invalid parameter '{on_error}': after an error the job waits (stop)")
        if not (auto_finalize and auto_dismiss):
            raise CommandError("a job is always finalized and dismissed by itself here")
        if self._daemon.overlay.armed:
            raise CommandError("the guest is not here yet, and changes the backing: overlay-activate first")
        if not self._daemon.image.backings:
            raise CommandError("everything is in the image already: there is nothing to stream")
        if speed is not None:
            self._change_speed(speed)
        if not self._job.start(job_id or device or JOB):
            raise CommandError(f"job '{self._job.identifier}' is {self._job.phase.value} already")

    def _query_block_jobs(self) -> object:
        return [self.told_of_job()] if self._job.phase in _ACTIVE else []

    def _query_jobs(self) -> object:
        if self._job.phase not in _ACTIVE:
            return []
        image = self._daemon.image
        told: dict[str, object] = {
            "id": self._job.identifier,
            "type": "stream",
            "status": _STATUS[self._job.phase],
            "current-progress": image.local_bytes,
            "total-progress": image.size,
        }
        return [told | ({"error": self._job.error} if self._job.error else {})]

    def _set_speed(self, device: str, speed: int) -> None:
        self._require(device)
        self._change_speed(speed)

    def _change_speed(self, speed: int) -> None:
        if not 0 <= speed <= _LARGEST:
            raise CommandError(f"Invalid parameter '{speed}': a speed is 0 or more bytes per second")
        self._daemon.streamer.limit.speed = speed

    def _pause(self, device: str) -> None:
        self._require(device)
        if not self._job.pause():
            raise CommandError(f"job '{device}' is {self._job.phase.value}: it does not run")

    def _resume(self, device: str) -> None:
        self._require(device)
        self._daemon.sources.retry()
        if not self._job.resume():
            raise CommandError(f"job '{device}' is {self._job.phase.value}: there is nothing to resume")

    def _cancel(self, device: str, force: bool = False) -> None:
        self._require(device)
        self._job.cancel()

    def _require(self, device: str) -> None:
        if self._job.phase not in _ACTIVE or device != self._job.identifier:
            raise CommandError(f"Block job '{device}' not found", "DeviceNotActive")

    def _activate(self) -> None:
        self._daemon.overlay.activate()

    def _invalidate(self, offset: int, length: int) -> None:
        size = self._daemon.image.size
        if not (0 <= offset <= size and 0 <= length <= size - offset):
            raise CommandError(f"{length} bytes at {offset} are not within the disk of {size} bytes")
        self._daemon.overlay.invalidate(offset, length)

    def told_of_job(self) -> dict[str, object]:
        """QEMU's BlockJobInfo."""
        job, image = self._job, self._daemon.image
        return {
            "type": "stream",
            "device": job.identifier,
            "len": image.size,
            "offset": image.local_bytes,
            "speed": self._daemon.streamer.limit.speed,
            "busy": job.phase is Phase.RUNNING,
            "paused": job.phase in (Phase.PAUSED, Phase.FAILED),
            "ready": False,
            "io-status": "failed" if job.phase is Phase.FAILED else "ok",
            "status": _STATUS[job.phase],
            "auto-finalize": True,
            "auto-dismiss": True,
        } | ({"error": job.error} if job.error else {})

    def _query_overlay(self) -> object:
        """Everything that ``status`` shows. Sizes in bytes, times in seconds, rates in bytes per second."""
        daemon, job = self._daemon, self._job
        image, streamer, fetched = daemon.image, daemon.streamer, daemon.overlay.fetcher.fetched
        now = time.monotonic()
        ended = daemon.window_ended or now
        left = image.size - image.local_bytes
        rate = streamer.window.rate if job.phase is Phase.RUNNING else 0.0
        return {
            "image": str(daemon.options.image),
            "size": image.size,
            "local": image.local_bytes,
            "complete": image.complete,
            "armed": daemon.overlay.armed,
            "copy-on-read": daemon.overlay.keeps,
            "phase": job.phase.value,
            "error": job.error,
            "speed": streamer.limit.speed,
            "rate": rate,
            "seconds-left": left / rate if rate and left else None,
            "latency": streamer.window.latency,
            "in-flight": streamer.in_flight,
            "in-flight-limit": streamer.window.size,
            "streamed": streamer.streamed,
            "fetched": fetched.bytes,
            "fetched-ahead": fetched.ahead,
            "misses": fetched.misses,
            "window": ended - daemon.window_began if daemon.window_began is not None else None,
            "sources": [dataclasses.asdict(health) for health in daemon.sources.health()],
        }


@contextlib.contextmanager
def served(server: Server, daemon: Daemon, listener: Listener) -> Iterator[None]:
    """Serve the monitor on this socket until the server has ended."""
    control = Control(server, daemon)
    monitor = Monitor(listener, "nbd-overlay", control.commands)

    def tell(new: Phase) -> None:
        """QEMU's events for what becomes of a job."""
        job = daemon.job.identifier
        monitor.emit("JOB_STATUS_CHANGE", {"id": job, "status": _STATUS[new]})
        info = control.told_of_job()
        summary = {key: info[key] for key in ("type", "device", "len", "offset", "speed")}
        if new is Phase.DONE:
            monitor.emit("BLOCK_JOB_COMPLETED", summary)
        elif new is Phase.FAILED:
            monitor.emit("BLOCK_JOB_ERROR", {"device": job, "operation": "read", "action": "stop"})
        elif new is Phase.IDLE:
            monitor.emit("BLOCK_JOB_CANCELLED", summary)

    daemon.job.tell = tell
    monitor.start()
    _LOG.info("monitor on %s", listener)
    try:
        yield
        monitor.emit("SHUTDOWN", {"guest": False, "reason": control.server.end_reason})
    finally:
        monitor.close()
