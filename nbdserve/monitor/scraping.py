"""The HTTP server that metrics are scraped from: few clients at a time, none of them for long."""

from __future__ import annotations

import logging
import socket
import threading
import time
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from nbdserve.common.threads import Thread
from nbdserve.connection.accepting import ACCEPT_PAUSE, AcceptFailures

_LOG = logging.getLogger("nbdserve")

MOST_CLIENTS = 32
"""Clients at a time, each with a thread; when one more comes, the one that has been there longest goes."""
TIME_LIMIT = 10.0
"""Seconds that a client is given from the connection to the end of the answer."""


class Handler(WSGIRequestHandler):
    """Answers one scrape."""

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        """Scrapes are of interest to nobody."""
        _LOG.debug("metrics: " + format, *arguments)


class HttpServer(ThreadingMixIn, WSGIServer):
    """Serves a WSGI application. An honest scrape takes milliseconds: who is cut off is no scraper."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, sock: socket.socket, *, most: int = MOST_CLIENTS, seconds: float = TIME_LIMIT) -> None:
        """Serve on a listening socket, which is closed with the server."""
        self.address_family = sock.family
        self._most = most
        self._seconds = seconds
        self._lock = threading.Lock()
        # Since when, by time.monotonic(), in the order of arrival.
        self._clients: dict[socket.socket, float] = {}
        self._accept_failures = AcceptFailures()
        super().__init__(sock.getsockname(), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.server_address = sock.getsockname()
        # Not by a look-up, which may take long.
        self.server_name, self.server_port = (str(self.server_address[0]), int(self.server_address[1]))
        self.setup_environ()

    def get_request(self) -> tuple[Any, Any]:
        """Accept a client. OSError is an end of the attempt, which follows again at once: not too soon."""
        try:
            return super().get_request()
        except OSError as error:
            if self._accept_failures.is_news(error):
                _LOG.warning("metrics: cannot accept a client: %s", error.strerror or error)
            time.sleep(ACCEPT_PAUSE)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a client that has come, in a thread of its own."""
        with self._lock:
            self._clients[request] = time.monotonic()
            crowd = list(self._clients)[: -self._most]
            self._cut(crowd)
        try:
            Thread(self.process_request_thread, "scrape", request, client_address).start()
        except OSError as error:
            _LOG.warning("metrics: %s: a scrape is turned away: %s", client_address[0], error.strerror)
            self.shutdown_request(request)

    def service_actions(self) -> None:
        """From time to time: cut those off whose time is over."""
        latest = time.monotonic() - self._seconds
        with self._lock:
            self._cut([client for client, since in self._clients.items() if since <= latest])

    def shutdown_request(self, request: Any) -> None:
        """Take leave of a client that has been served or cut off."""
        with self._lock:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle of a scrape harms nobody."""
        _LOG.debug("metrics: a scrape has failed", exc_info=True)

    def _cut(self, clients: list[socket.socket]) -> None:
        """End their connections, with the lock held, so that none is closed, and its descriptor another's."""
        for client in clients:
            del self._clients[client]
            try:
                client.shutdown(socket.SHUT_RDWR)
            except OSError:
                # It has gone by itself; its thread notices that as well.
                pass
