"""What the monitor of ``nbd-overlay serve`` can do: QEMU's block jobs, for the one job that there is.

Names, answers, refusals and the order of events are those of QEMU 7.2 (qapi/block-core.json, qapi/job.json),
but for what docs/overlay.md lists. Commands that nbdserve has as well are in nbdserve/monitor/control.py, the
monitor's own (``qmp_capabilities``, ``query-commands``, ``query-version``) in nbdserve/qmp/endpoint.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from operator import itemgetter

from nbdserve.client import Target
from nbdserve.common.errors import OperatorError, reason_of
from nbdserve.common.threads import promised
from nbdserve.connection.listeners import Listener
from nbdserve.exports.export_options import ImageOptions
from nbdserve.monitor.control import Control as ServerControl
from nbdserve.monitor.dirty_bitmap import Ranges
from nbdserve.protocol.constants import NbdError
from nbdserve.protocol.requests import wire_error
from nbdserve.qmp.dispatch import CommandError, Handler
from nbdserve.qmp.endpoint import Monitor
from nbdserve.service.server import Server
from overlay.backing.dirty_bitmap import read_dirty_bitmap
from overlay.channel.address import MigrateUri, parse_backing
from overlay.daemon import Daemon
from overlay.fill.job import OnError, Phase
from overlay.monitor.events import STATUS, JobEvents

_LOG = logging.getLogger("nbd-overlay")

JOB = "stream"
"""What the job is called by who does not say."""
_LARGEST = (1 << 63) - 1
_ACTIVE = (Phase.RUNNING, Phase.PAUSED, Phase.FAILED)
_RESTING = (Phase.PAUSED, Phase.FAILED)
_JOB_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_OF_SERVER = ("query-block-exports", "x-query-clients", "x-disconnect-client")


class Control:
    """The commands, and the events that they lead to."""

    def __init__(self, server: Server, daemon: Daemon) -> None:
        self.server = ServerControl(server, ImageOptions())
        self._server = server
        self.events = JobEvents(daemon)
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
            "overlay-verify": self._verify,
            "overlay-backing": self._move_backing,
            "quit": self._quit,
        }
        if daemon.channel is not None:
            # Only now: it takes memory that others need not have.
            from overlay.monitor.channel import ChannelControl

            self.commands |= ChannelControl(daemon, daemon.channel).commands

    def _block_stream(
        self,
        device: str,
        job_id: str | None = None,
        speed: int | None = None,
        on_error: str = OnError.STOP.value,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
    ) -> None:
        """Stream everything. The device is whatever the caller calls the disk: there is only one."""
        if job_id is not None and not _JOB_ID.fullmatch(job_id):
            raise CommandError(f"Invalid job ID '{job_id}'")
        if on_error not in [each.value for each in OnError]:
            raise CommandError(f"Parameter 'on-error' does not accept value '{on_error}': stop or report")
        if not (auto_finalize and auto_dismiss):
            raise CommandError("a job is always finalized and dismissed by itself here")
        if self._daemon.overlay.armed:
            raise CommandError("the guest is not here yet, and changes the backing: overlay-activate first")
        if self._job.phase in _ACTIVE:
            raise CommandError(f"Node '{device}' is busy: block device is in use by block job: stream")
        if speed is not None:
            self._change_speed(speed)
        identifier = job_id or device or JOB
        if self._daemon.finished:
            self.events.tell_of_nothing_to_do(identifier)
        elif not self._job.start(identifier, OnError(on_error)):
            raise CommandError(f"Node '{device}' is busy: its last block job is about to end")

    def _query_block_jobs(self) -> object:
        return [self._block_job()] if self._job.phase in _ACTIVE else []

    def _query_jobs(self) -> object:
        if self._job.phase not in _ACTIVE:
            return []
        done, total = self._daemon.progress.look()
        return [
            {
                "id": self._job.identifier,
                "type": "stream",
                "status": STATUS[self._job.phase],
                "current-progress": done,
                "total-progress": total,
            }
        ]

    def _set_speed(self, device: str, speed: int) -> None:
        self._require(device)
        self._change_speed(speed)

    def _change_speed(self, speed: int) -> None:
        if not 0 <= speed <= _LARGEST:
            raise CommandError("Parameter 'speed' expects a non-negative value")
        self._daemon.streamer.limit.speed = speed

    def _pause(self, device: str) -> None:
        self._require(device)
        if not self._job.pause():
            raise CommandError("Job is already paused")

    def _resume(self, device: str) -> None:
        self._require(device)
        if self._job.phase not in _RESTING:
            raise CommandError("Can't resume a job that was not paused")
        self._daemon.sources.retry()
        self._job.resume()

    def _cancel(self, device: str, force: bool = False) -> None:
        self._require(device)
        if self._job.phase in _RESTING and not force:
            raise CommandError(f"The block job for device '{device}' is currently paused")
        self._job.cancel()

    def _require(self, device: str) -> None:
        if self._job.phase not in _ACTIVE or device != self._job.identifier:
            raise CommandError(f"Block job '{device}' not found", "DeviceNotActive")

    def _activate(self) -> Future[None]:
        """Waits for a range that is being forgotten, and reads from the image."""
        return promised("overlay-activate", self._daemon.overlay.activate)

    def _invalidate(
        self,
        offset: int | None = None,
        length: int | None = None,
        ranges: list[object] | None = None,
        bitmap: str | None = None,
        backing: str | None = None,
    ) -> Future[dict[str, int]]:
        """Waits for the disk and, where a bitmap is to be read, for the server that has it."""
        ways = (offset is not None or length is not None, ranges is not None, bitmap is not None)
        if sum(ways) != 1 or (offset is None) != (length is None) or (backing is not None and bitmap is None):
            raise CommandError(
                "give either offset and length, or ranges, or a bitmap and perhaps its backing"
            )
        if bitmap is not None:
            uri = self._bitmap_at(backing)
            size = self._daemon.image.size
            return promised(
                "overlay-invalidate", lambda: self._forget(lambda: read_dirty_bitmap(uri, bitmap, size))
            )
        given: list[object] = [[offset, length]]
        wanted = checked_ranges(given if ranges is None else ranges, self._daemon.image.size)
        return promised("overlay-invalidate", lambda: self._forget(lambda: wanted))

    def _bitmap_at(self, backing: str | None) -> Target:
        """Where a bitmap is to be read: by default at the backing itself, the first that answers."""
        if backing is not None:
            return self._target(backing)
        known = self._daemon.sources.health()
        if not known:
            raise CommandError("the image has no backing any more whose bitmap could be read")
        return self._target(next((each for each in known if each.connected), known[0]).uri)

    def _target(self, backing: str) -> Target:
        address = parse_backing(backing)
        if not isinstance(address, MigrateUri):
            return address
        if self._daemon.channel is None:
            raise CommandError(f"{address}: there is no channel through which it is reached")
        return self._daemon.channel.through(address)

    def _move_backing(self, backing: list[object]) -> Future[None]:
        """The same disk is at these addresses now. Waits for those servers that are let go."""
        if self._daemon.finished:
            raise CommandError("everything is here: there is no backing any more")
        if not backing or not all(isinstance(each, str) for each in backing):
            raise CommandError("backing: give a list of one address or more")
        targets = [self._target(str(each)) for each in backing]
        return promised("overlay-backing", lambda: self._daemon.sources.move_to(targets))

    def _forget(self, wanted: Callable[[], Ranges]) -> dict[str, int]:
        try:
            ranges = wanted()
            self._daemon.invalidate(ranges)
        except (OSError, OperatorError) as error:
            raise CommandError(reason_of(error)) from error
        return {"ranges": len(ranges), "bytes": sum(map(itemgetter(1), ranges))}

    def _verify(self, enable: bool) -> None:
        """Say whether the copy is verified before the source is needed no more."""
        if enable and not self._daemon.image.records_writer:
            raise CommandError("the image's layout does not record what the guest writes")
        if enable and self._daemon.finished:
            raise CommandError("the image is complete, and needs its source no more")
        self._daemon.streamer.verifying.wanted = enable

    def _block_job(self) -> dict[str, object]:
        """QEMU's BlockJobInfo; with how far a comparison has come, where one is wanted."""
        job = self._job
        verifying = self._daemon.streamer.verifying
        more = {"x-verified": verifying.looked_at} if verifying.wanted else {}
        done, total = self._daemon.progress.look()
        return {
            "type": "stream",
            "device": job.identifier,
            "len": total,
            "offset": done,
            "speed": self._daemon.streamer.limit.speed,
            "busy": job.phase is Phase.RUNNING,
            "paused": job.phase in _RESTING,
            "ready": self._daemon.streamer.is_ready,
            "io-status": self._io_status(),
            "status": STATUS[job.phase],
            "auto-finalize": True,
            "auto-dismiss": True,
            **more,
        }

    def _verified(self) -> dict[str, object] | None:
        """How far the comparison with the source is, in bytes; None where none is wanted."""
        verifying = self._daemon.streamer.verifying
        if not verifying.wanted and not verifying.is_over:
            return None
        return {
            "over": verifying.is_over,
            "compared": verifying.compared,
            "written": verifying.written,
            "differing": len(verifying.differing),
            "first": min(verifying.differing, default=None),
            "seconds": verifying.seconds,
        }

    def _io_status(self) -> str:
        """QEMU's BlockDeviceIoStatus: whether an error, or the lack of space, has stopped the job."""
        if self._job.phase is not Phase.FAILED:
            return "ok"
        return "nospace" if wire_error(self._job.error_number) is NbdError.ENOSPC else "failed"

    def _quit(self, force: bool = False) -> None:
        """End; not under a guest, which would lose its disk, unless that is forced."""
        guests = [
            client
            for client in self._server.clients.everyone()
            if client.export is not None and not client.has_gone()
        ]
        if guests and not force:
            missing = "" if self._daemon.finished else ", and not all of the disk is here"
            raise CommandError(
                f"a guest uses the disk (clients: {len(guests)}){missing}; end it or let it pivot to the "
                "file first; with force this ends all the same, and the guest's requests wait or fail"
            )
        self.server.commands["quit"]()

    def _query_overlay(self) -> object:
        """Everything that ``status`` shows. Sizes in bytes, times in seconds, rates in bytes per second."""
        daemon, job = self._daemon, self._job
        image, streamer, fetcher = daemon.image, daemon.streamer, daemon.overlay.fetcher
        done, total = daemon.progress.look()
        fetched, copied = fetcher.fetched, fetcher.copied
        return {
            "image": str(daemon.options.image),
            "size": image.size,
            "local": image.local_bytes,
            "done": done,
            "total": total,
            "complete": daemon.finished,
            "armed": daemon.overlay.armed,
            "copy-on-read": daemon.overlay.keeps,
            "phase": job.phase.value,
            "ready": streamer.is_ready,
            "job": job.identifier or None,
            "error": job.error,
            "streams-when-activated": daemon.overlay.armed and daemon.options.stream,
            "speed": streamer.limit.speed,
            "rate": daemon.rate,
            "seconds-left": daemon.seconds_left,
            "latency": streamer.window.latency,
            "in-flight": streamer.in_flight,
            "in-flight-limit": streamer.window.size,
            "copied": copied.total,
            "streamed": streamer.streamed,
            "seed": None if streamer.seeding is None else streamer.seeding.path,
            "seeded": 0 if streamer.seeding is None else streamer.seeding.bytes,
            "seed-trouble": None if streamer.seeding is None else streamer.seeding.trouble,
            "verify": self._verified(),
            "fetched": fetched.bytes,
            "fetched-ahead": fetched.ahead,
            "misses": fetched.misses,
            "miss-seconds": fetched.waits.seconds,
            "window": daemon.window,
            "needed-bytes": daemon.needed_bytes,
            "channel": None if daemon.channel is None else daemon.channel.told(),
            "mirror": _mirror_told(daemon),
            "sources": [dataclasses.asdict(health) for health in daemon.sources.health()],
        }


def _mirror_told(daemon: Daemon) -> dict[str, object] | None:
    """How the mirror is, where there is one."""
    if daemon.mirror is None:
        return None
    told = daemon.mirror.status()
    return {
        "uri": told.uri,
        "state": told.state.value,
        "trouble": told.trouble or None,
        "point": told.point,
        "point-time": told.point_time or None,
        "points": told.points,
        "lag": told.lag_bytes,
        "lag-seconds": told.lag_seconds,
        "sent": told.sent,
    }


def checked_ranges(given: list[object], size: int) -> Ranges:
    """Return ranges of a disk as a monitor's command has them: lists of offset and length. CommandError."""
    ranges: Ranges = []
    for each in given:
        match each:
            case [int(offset), int(length)] if 0 <= offset <= size and 0 <= length <= size - offset:
                ranges.append((offset, length))
            case [int(offset), int(length)]:
                raise CommandError(f"{length} bytes at {offset} are not within the disk of {size} bytes")
            case _:
                raise CommandError("each of the ranges is a list of an offset and a length, in bytes")
    return ranges


@contextlib.contextmanager
def served(server: Server, daemon: Daemon, listener: Listener) -> Iterator[None]:
    """Serve the monitor on this socket until the server has ended."""
    control = Control(server, daemon)
    monitor = Monitor(listener, "nbd-overlay", control.commands)
    control.events.emit = monitor.emit
    daemon.job.tell = control.events.tell
    if daemon.channel is not None:
        daemon.channel.emit = monitor.emit
    if daemon.mirror is not None:
        daemon.mirror.tell = control.events.tell_of_mirror
    monitor.start()
    _LOG.info("monitor on %s", listener)
    try:
        yield
        monitor.emit("SHUTDOWN", {"guest": False, "reason": control.server.end_reason})
    finally:
        monitor.close()
