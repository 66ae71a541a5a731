"""The parts of a running overlay, put together and taken apart in an order in which nothing is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import wait
from functools import partial
from typing import TYPE_CHECKING

from nbdserve.common.errors import ImageError, reason_of
from nbdserve.common.threads import promised
from overlay.backing.failover import Sources
from overlay.backing.reads import SECTOR
from overlay.backing.seed import Seed
from overlay.engine import Overlay
from overlay.fill.checkpoint import Checkpoints
from overlay.fill.job import Job, Phase
from overlay.fill.progress import Progress
from overlay.fill.seeding import Seeding
from overlay.fill.streamer import Streamer
from overlay.formats.image import Image
from overlay.options import Options

if TYPE_CHECKING:
    from overlay.channel.end import Channel
    from overlay.mirror.recorder import Recorder
    from overlay.mirror.shipper import Mirror

_LOG = logging.getLogger("nbd-overlay")
_FIRST_LOOK = 10.0
"""Seconds in which the source must have shown something of the disk, before its RAM is taken."""


class Daemon:
    """One overlay at work. Owns the image and the sources; the Overlay is closed with its export."""

    def __init__(
        self,
        image: Image,
        sources: Sources,
        options: Options,
        seed: Seed | None = None,
        channel: Channel | None = None,
    ) -> None:
        self.image = image
        self.sources = sources
        self.options = options
        self.channel = channel
        self.job = Job()
        recorder: Recorder | None = None
        self.mirror: Mirror | None = None
        if options.mirror is not None:
            # Only now: others start without them.
            from overlay.mirror.recorder import Recorder
            from overlay.mirror.shipper import Mirror

            recorder = Recorder(image, options.mirror_queue)
            self.mirror = Mirror(options.mirror, image, recorder)
        self.overlay = Overlay(
            image,
            sources,
            keep=options.keep,
            armed=options.armed,
            on_activation=self._activated,
            changes=recorder,
        )
        self._seed = seed
        seeding = None if seed is None else Seeding(seed, image, sources)
        self.streamer = Streamer(
            image, sources, self.overlay.fetcher, self.job, self._finished, self._is_due, seeding
        )
        self.streamer.limit.speed = options.speed
        self.streamer.verifying.wanted = options.verify
        self.progress = Progress(image)
        self.window_began: float | None = None
        """When the guest came here, by the monotonic clock; from then on it depends on the source."""
        self.window_ended: float | None = None
        """When nothing of the source was needed any more."""
        self._checkpoints = Checkpoints(image)
        if channel is not None:
            channel.source_came = sources.reconnect
            channel.ram_came = self._ram_came
            channel.guest_came = self._guest_came
            sources.refused = self._is_other_disk
        elif options.armed:
            # Where it is reached through another disk's channel, it comes with the guest.
            sources.is_awaited = lambda: self.overlay.guest_is_here or sources.was_connected

    def start(self) -> None:
        """Connect to the backing, and stream if that was asked for."""
        self._checkpoints.start()
        self.streamer.start()
        if self.mirror is not None:
            self.mirror.start()
        if self.channel is not None:
            self.channel.start()
        if self.image.backings:
            self.sources.start()
            if not self.overlay.armed:
                self._stream_if_asked()
        else:
            self._finished()
            self.sources.close()

    def stop(self) -> None:
        """End what goes on beside the guests' requests."""
        if self.mirror is not None:
            self.mirror.close()
        self.sources.close()
        self.streamer.close()
        self._checkpoints.close()
        if self.channel is not None:
            self.channel.close()
        if self._seed is not None:
            self._seed.close()

    @property
    def finished(self) -> bool:
        """Tell whether the source is needed no more, and another process may take the image over."""
        return self.window_ended is not None

    @property
    def window(self) -> float | None:
        """Tell for how many seconds the guest depends on the source, or did; None before it came here."""
        if self.window_began is None:
            return None
        return max(0.0, (self.window_ended or time.monotonic()) - self.window_began)

    @property
    def needed_bytes(self) -> int | None:
        """Tell how many bytes of the guest's disk are not on stable storage here, at most.

        0 is told when the source may be switched off, and never before: what is compared with it then
        (``verify``) cannot be any more, but nothing is lost. None while the guest may run there.
        """
        if self.finished:
            return 0
        is_elsewhere = self.window_began is None and (self.overlay.armed or self.options.pre_copy)
        return None if is_elsewhere else self._checkpoints.unstable_bytes

    @property
    def rate(self) -> float | None:
        """Tell how many bytes a second become local by copying; None while that is not known."""
        if self.job.phase is not Phase.RUNNING or not self.streamer.has_surveyed:
            return None
        return self.overlay.fetcher.copied.rate()

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds until everything is here; None while that cannot be known."""
        if self.finished:
            return 0.0
        rate = self.rate
        # Once the zeros have been marked all that is absent is data.
        if not rate or not self.sources.connected:
            return None
        return (self.image.size - self.image.local_bytes) / rate

    def invalidate(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Forget ranges, which the guest has changed at the source; OSError, EBUSY, once it runs here."""
        try:
            self.progress.take_away(lambda: self.overlay.invalidate(ranges))
        finally:
            # A cluster is taken away as a whole.
            edges = 2 * self.image.cluster_size * len(ranges)
            self._checkpoints.taken_away(sum(length for _, length in ranges) + edges)
        self.streamer.look_again()

    def _is_due(self) -> bool:
        """Whether the image may be cut loose from its backing: until the guest is here that may change."""
        return not self.options.pre_copy or self.window_began is not None

    def _ram_came(self) -> None:
        """RAM begins to come: a guest whose disk cannot be had here must stay where it is."""
        if self.channel is not None:
            promised("first look", partial(self._let_ram_in, self.channel))

    def _let_ram_in(self, channel: Channel) -> None:
        looked = promised("first sector", partial(self.sources.read, (0, _first_sector())))
        wait([looked], _FIRST_LOOK)
        # A sector that has gone bad is no reason to stay.
        if self.finished or (looked.done() and self.sources.connected):
            channel.let_ram_in()
        else:
            channel.turn_away(f"the guest would be without its disk: {self.sources.troubles()}")

    def _guest_came(self) -> None:
        """All of the guest's RAM is here. In the channel's thread, which must not wait for a disk."""
        promised("activate", self._activate)

    def _activate(self) -> None:
        try:
            self.overlay.activate()
            # What is kept tells that the guest is here, should this process be started again.
            self.overlay.read_into(0, _first_sector())
            self.image.flush()
        except (OSError, ImageError) as error:
            # Its first write tries again.
            _LOG.error("the guest is here, but what it reads is not kept yet: %s", reason_of(error))

    def _is_other_disk(self, why: str) -> None:
        """What the source has is not this disk: as long as the guest is there, that is where it stays."""
        if self.channel is not None and not self.overlay.guest_is_here:
            channel = self.channel
            promised("turn away", lambda: channel.turn_away(why))

    def _activated(self) -> None:
        self.window_began = time.monotonic()
        if self.channel is not None:
            self.channel.guest_is_here()
        self.streamer.look_again()
        if self.image.backings:
            self._know_the_disk_again()
            self._stream_if_asked()

    def _know_the_disk_again(self) -> None:
        """From now on the backing is as it is, and must have what was copied and not been invalidated."""
        self.sources.samples.pin()
        try:
            self.sources.samples.recall(self.image)
        except (OSError, ImageError) as error:
            # The guest's write goes on; what cannot be read here it is told when it reads it.
            _LOG.warning("the backing is not compared with what is here: %s", error)
        if self.sources.samples.any_known:
            self.sources.check_again()

    def _stream_if_asked(self) -> None:
        if self.options.stream:
            self.job.start("stream")

    def _finished(self) -> None:
        """Everything is here: whoever takes over may open the image, and the source may go."""
        self.window_ended = time.monotonic()
        self.image.share()
        if self.channel is not None:
            self.channel.complete()


def _first_sector() -> memoryview:
    """A buffer for it."""
    return memoryview(bytearray(SECTOR))
