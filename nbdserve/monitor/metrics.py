"""Metrics for Prometheus over HTTP: collected from the server's own counters when somebody asks for them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
from collections.abc import Iterator
from wsgiref.types import WSGIApplication

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector as PrometheusCollector

from nbdserve.common.errors import ConnectError
from nbdserve.common.threads import Thread
from nbdserve.connection.listeners import address_text, bind_tcp
from nbdserve.monitor.scraping import HttpServer
from nbdserve.service.server import Server
from nbdserve.transmission.traffic import BUCKETS, COMMANDS, Histogram, Traffic

_LOG = logging.getLogger("nbdserve")
_BOUNDS = [*map(str, BUCKETS), "+Inf"]
_BY_COMMAND = ("export", "command")


class Collector(PrometheusCollector):
    """What a server's clients do."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """Return everything at this moment."""
        exports = self._server.exports
        traffic = {export.name: exports.traffic(export) for export in exports.everything()}
        yield from _by_command(traffic)
        yield _latencies(traffic)
        connections = GaugeMetricFamily("nbdserve_connections", "Clients of an export", labels=("export",))
        size = GaugeMetricFamily("nbdserve_export_size_bytes", "The size of an export", labels=("export",))
        for export in exports.everything():
            connections.add_metric((export.name,), len(export.users))
            size.add_metric((export.name,), export.offer.size)
        yield connections
        yield size
        yield from self._door()

    def _door(self) -> Iterator[Metric]:
        """Who came, who was not let in, and what all of them hold."""
        server = self._server
        yield CounterMetricFamily(
            "nbdserve_accepted_connections", "Clients that were let in", value=server.accepted
        )
        turned_away = CounterMetricFamily(
            "nbdserve_refused_connections", "Clients that were turned away or cut off", labels=("reason",)
        )
        for reason, count in sorted(server.turned_away.items()):
            turned_away.add_metric((reason,), count)
        yield turned_away
        yield GaugeMetricFamily(
            "nbdserve_handshakes",
            "Clients that have not chosen an export",
            value=server.clients.haggling,
        )
        yield GaugeMetricFamily(
            "nbdserve_request_memory_bytes", "Memory of requests that wait", value=server.memory.held
        )


def _by_command(traffic: dict[str, Traffic]) -> Iterator[Metric]:
    requests = CounterMetricFamily("nbdserve_requests", "Requests received", labels=_BY_COMMAND)
    sizes = CounterMetricFamily("nbdserve_bytes", "Bytes that requests were about", labels=_BY_COMMAND)
    errors = CounterMetricFamily("nbdserve_errors", "Requests answered with an error", labels=_BY_COMMAND)
    for name, counted in traffic.items():
        for command in COMMANDS:
            labels = (name, command.name.lower())
            requests.add_metric(labels, counted.requests[command])
            sizes.add_metric(labels, counted.bytes[command])
            errors.add_metric(labels, counted.errors[command])
    return iter((requests, sizes, errors))


def _latencies(traffic: dict[str, Traffic]) -> Metric:
    family = HistogramMetricFamily(
        "nbdserve_request_duration_seconds",
        "From receiving a request, or the batch that it came in, to sending its reply",
        labels=_BY_COMMAND,
    )
    for name, counted in traffic.items():
        for command, histogram in counted.latencies():
            family.add_metric((name, command.name.lower()), buckets(histogram), histogram.seconds)
    return family


def buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Return what prometheus-client wants: each bound with how many took no longer."""
    return list(zip(_BOUNDS, itertools.accumulate(histogram.counts), strict=True))


@contextlib.contextmanager
def served(collector: PrometheusCollector, host: str, port: int) -> Iterator[None]:
    """Answer scrapes at this address; ConnectError when nobody can listen there."""
    registry = CollectorRegistry()
    registry.register(collector)
    ProcessCollector(registry=registry)
    application = make_wsgi_app(registry)
    with contextlib.ExitStack() as stack:
        listening = _listen(host, port)
        for sock in listening:
            stack.callback(sock.close)
        for sock in listening:
            stack.enter_context(_served_on(sock, application))
        yield


@contextlib.contextmanager
def _served_on(sock: socket.socket, application: WSGIApplication) -> Iterator[None]:
    server = HttpServer(sock)
    server.set_app(application)
    _LOG.info("metrics on http://%s/metrics", address_text(sock.getsockname()))
    Thread(server.serve_forever, "metrics").start()
    try:
        yield
    finally:
        server.shutdown()


def _listen(host: str, port: int) -> list[socket.socket]:
    try:
        return bind_tcp(host, port)
    except OSError as error:
        raise ConnectError(
            f"{address_text((host or '*', port))}: cannot tell metrics there: {error.strerror}, "
            f"choose another --metrics"
        ) from error
