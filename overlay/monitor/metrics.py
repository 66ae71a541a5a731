"""Metrics of ``nbd-overlay serve`` for Prometheus: how copying goes, and those of the NBD server."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector as PrometheusCollector

from nbdserve.monitor import metrics
from nbdserve.service.server import Server
from overlay.daemon import Daemon
from overlay.fill.job import Phase
from overlay.mirror.status import MirrorState


class Collector(PrometheusCollector):
    """What a daemon does, and what its clients do. What is not known at the moment has no sample."""

    def __init__(self, server: Server, daemon: Daemon) -> None:
        self._server = metrics.Collector(server)
        self._daemon = daemon

    def collect(self) -> Iterator[Metric]:
        """Return everything at this moment."""
        yield from self._server.collect()
        yield from self._copying()
        yield self._waits()
        yield from self._state()
        yield from self._sources()
        yield from self._channel()
        yield from self._mirror()

    def _copying(self) -> Iterator[Metric]:
        daemon = self._daemon
        fetched, seeding = daemon.overlay.fetcher.fetched, daemon.streamer.seeding
        for name, what, value in (
            ("copied_bytes", "Bytes that became local by copying", daemon.overlay.fetcher.copied.total),
            ("streamed_bytes", "Bytes that streaming received", daemon.streamer.streamed),
            (
                "seeded_bytes",
                "Bytes that became local from the seed",
                0 if seeding is None else seeding.bytes,
            ),
            ("fetched_bytes", "Bytes received because a client missed them, or might soon", fetched.bytes),
            ("fetched_ahead_bytes", "Bytes of these that no client had asked for yet", fetched.ahead),
            ("misses", "Requests of clients that waited for a source", fetched.misses),
        ):
            yield CounterMetricFamily(f"nbd_overlay_{name}", what, value=value)

    def _waits(self) -> Metric:
        fetched = self._daemon.overlay.fetcher.fetched
        with fetched.lock:
            buckets, seconds = metrics.buckets(fetched.waits), fetched.waits.seconds
        return HistogramMetricFamily(
            "nbd_overlay_miss_seconds",
            "How long requests of clients waited for a source",
            buckets=buckets,
            sum_value=seconds,
        )

    def _state(self) -> Iterator[Metric]:
        daemon = self._daemon
        for name, what, value in (
            ("size_bytes", "The size of the disk", daemon.image.size),
            ("local_bytes", "How much of it is in the image", daemon.image.local_bytes),
            ("complete", "1 when the source is needed no more", int(daemon.finished)),
            ("armed", "1 until the guest runs here", int(daemon.overlay.armed)),
            ("rate_bytes_per_second", "How fast the disk becomes local by copying", daemon.rate),
            ("seconds_left", "Until the disk is local, at this rate", daemon.seconds_left),
            ("window_seconds", "How long the guest here has depended on the source, or did", daemon.window),
            (
                "source_needed_bytes",
                "Bytes of the guest's disk that are not on stable storage here; 0: the source may go",
                daemon.needed_bytes,
            ),
            ("speed_limit_bytes_per_second", "Of streaming; 0 is none", daemon.streamer.limit.speed),
            ("in_flight_bytes", "What streaming has asked for", daemon.streamer.in_flight),
        ):
            yield GaugeMetricFamily(f"nbd_overlay_{name}", what, value=value)
        phases = GaugeMetricFamily("nbd_overlay_phase", "1 for what the job is doing", labels=("phase",))
        now = daemon.job.phase
        for phase in Phase:
            phases.add_metric((phase.value,), int(phase is now))
        yield phases

    def _mirror(self) -> Iterator[Metric]:
        """Of the mirror of the guest's writes, where there is one."""
        if self._daemon.mirror is None:
            return
        told = self._daemon.mirror.status()
        for name, what, value in (
            ("lag_bytes", "Changes of the guest that it lacks, at most", told.lag_bytes),
            ("lag_seconds", "How long ago the first of these was made", told.lag_seconds),
            (
                "point_time_seconds",
                "When the disk was as the mirror has it; 0 until that is known",
                told.point_time,
            ),
        ):
            yield GaugeMetricFamily(f"nbd_overlay_mirror_{name}", what, value=value)
        for name, what, value in (
            ("points", "Points that it was given", told.points),
            ("sent_bytes", "Bytes sent there", told.sent),
        ):
            yield CounterMetricFamily(f"nbd_overlay_mirror_{name}", what, value=value)
        states = GaugeMetricFamily("nbd_overlay_mirror_state", "1 for how it follows", labels=("state",))
        for state in MirrorState:
            states.add_metric((state.value,), int(state is told.state))
        yield states

    def _channel(self) -> Iterator[Metric]:
        """Of a migration over one connection, where this is an end of it."""
        if self._daemon.channel is None:
            return
        told = self._daemon.channel.status()
        for name, what, value in (
            ("connected", "1 while the source is connected", int(told.connected)),
            ("streams", "Streams that are open", told.streams),
            ("held_bytes", "Bytes that have come and not been taken", told.held),
            ("bound_bytes", "The most that these may be: the windows of all open streams", told.bound),
        ):
            yield GaugeMetricFamily(f"nbd_overlay_channel_{name}", what, value=value)
        for name, what, value in (
            ("connections", "How often the source has connected", told.connections),
            ("sent_bytes", "Bytes sent to the source", told.sent),
            ("received_bytes", "Bytes received from the source", told.received),
        ):
            yield CounterMetricFamily(f"nbd_overlay_channel_{name}", what, value=value)

    def _sources(self) -> Iterator[Metric]:
        label = ("source",)
        connected = GaugeMetricFamily("nbd_overlay_source_connected", "1 when it can be asked", labels=label)
        latency = GaugeMetricFamily(
            "nbd_overlay_source_latency_seconds", "What small requests took lately", labels=label
        )
        errors = CounterMetricFamily("nbd_overlay_source_errors", "Requests that it failed", labels=label)
        rate = GaugeMetricFamily(
            "nbd_overlay_source_rate_bytes_per_second", "How fast its answers came lately", labels=label
        )
        slow = GaugeMetricFamily(
            "nbd_overlay_source_slow", "1 when it is asked for little at once", labels=label
        )
        quiet = GaugeMetricFamily(
            "nbd_overlay_source_quiet_seconds",
            "For how long it has left requests without a byte",
            labels=label,
        )
        # A source that is named twice is told once: samples with the same labels make a scrape fail.
        for health in {health.uri: health for health in self._daemon.sources.health()}.values():
            connected.add_metric((health.uri,), int(health.connected))
            latency.add_metric((health.uri,), health.latency)
            errors.add_metric((health.uri,), health.errors)
            rate.add_metric((health.uri,), health.rate)
            slow.add_metric((health.uri,), int(health.slow))
            quiet.add_metric((health.uri,), health.quiet)
        yield from (connected, latency, errors, rate, slow, quiet)
