"""The source's way to the destination: TCP, a Unix socket, or ssh; TLS; and the greeting."""

from __future__ import annotations

import errno
import secrets
import shlex
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from nbdserve.channel.places import Place, SshPlace, UnixPlace
from nbdserve.channel.transports import SocketTransport, TlsTransport, Transport, converse
from nbdserve.channel.wire.greeting import NONCE, Answer, Claim, Connector
from nbdserve.client.dial import Countdown, connect_tcp, connect_unix
from nbdserve.common.errors import ConnectError, ConnectionLostError, reason_of
from nbdserve.common.threads import promised

_END = 2.0
"""Seconds that ssh has to end when its connection is closed."""


@dataclass(frozen=True)
class Way:
    """How a place is reached."""

    place: Place
    tls: ssl.SSLContext | None = None
    hostname: str | None = None
    """The name that the destination's certificate must have, if it is not that of the host."""
    ssh: str = "ssh"
    """The command, with options, that leads to another host."""
    remote: str = "nbdserve"
    """What nbdserve is called there."""


class SshTransport(SocketTransport):
    """The standard streams of an ssh child, at whose other end nbdserve relays to a socket."""

    def __init__(self, way: Way, place: SshPlace) -> None:
        ours, theirs = socket.socketpair()
        port = [] if place.port is None else ["-p", str(place.port)]
        user = [] if place.user is None else ["-l", place.user]
        command = f"{way.remote} channel --relay {shlex.quote(place.path)}"
        words = [*shlex.split(way.ssh), "-T", "-o", "BatchMode=yes", *port, *user, "--", place.host, command]
        try:
            with theirs:
                self._child = subprocess.Popen(words, stdin=theirs.fileno(), stdout=theirs.fileno())
            super().__init__(ours, str(place))
        except OSError as error:
            ours.close()
            raise OSError(error.errno, f"{words[0]}: {reason_of(error)}") from error
        except BaseException:
            ours.close()
            raise

    @property
    def complaint(self) -> str:
        """Tell how ssh has failed, if it has, after ``close``."""
        code = self._child.returncode
        return f"ssh has ended with {code}; the log has what it said" if code > 0 else ""

    def interrupt(self) -> None:
        """Let who waits for it see its end."""
        self._child.terminate()

    def close(self) -> None:
        """Hang up, and see that ssh ends."""
        super().close()
        try:
            self._child.wait(_END)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


class Attempt:
    """One attempt to connect and greet, in a thread of its own: it may be given up at any moment.

    It has ``limit`` seconds. What is claimed is asked for when somebody is there, in that thread.
    """

    def __init__(self, way: Way, token: bytes, claim: Callable[[], Claim], limit: float) -> None:
        self._way = way
        self._token = token
        self._claim = claim
        self._limit = limit
        self._lock = threading.Lock()
        """Held for moments only: who is greeted, as long as that one is not closed."""
        self._greeted: SocketTransport | None = None
        self._given_up = False
        self._outcome = promised("connecting", self._reach)

    def wait(self, seconds: float) -> bool:
        """Wait for the outcome, so many seconds at most; tell whether there is one."""
        return bool(wait([self._outcome], seconds).done)

    def result(self) -> tuple[Transport, Answer]:
        """Wait for the outcome.

        Raises ConnectError when nobody is there, ProtocolError when it is no destination, RefusedError when
        it does not accept this; nothing is left open then.
        """
        return self._outcome.result()

    def give_up(self) -> None:
        """Let it end, and close what comes of it."""
        with self._lock:
            self._given_up = True
            if self._greeted is not None:
                self._greeted.interrupt()
        self._outcome.add_done_callback(_close)

    def _reach(self) -> tuple[Transport, Answer]:
        deadline, place = time.monotonic() + self._limit, self._way.place
        try:
            connected = _connected(self._way, self._limit)
        except OSError as error:
            raise ConnectError(f"{place}: {reason_of(error)}") from error
        with self._lock:
            self._greeted = connected
            if self._given_up:
                connected.interrupt()
        try:
            transport = _encrypted(connected, self._way, deadline)
            greeting = Connector(self._token, self._claim(), secrets.token_bytes(NONCE))
            converse(transport, greeting, deadline)
        except BaseException as error:
            with self._lock:
                self._greeted = None
            connected.close()
            if isinstance(error, ConnectionLostError | OSError):
                complaint = isinstance(connected, SshTransport) and connected.complaint
                why = complaint or reason_of(error).removeprefix(f"{place}: ")
                raise ConnectError(f"{place}: {why}") from error
            raise
        with self._lock:
            self._greeted = None
        assert greeting.answer is not None
        return transport, greeting.answer


def _close(outcome: Future[tuple[Transport, Answer]]) -> None:
    if outcome.exception() is None:
        outcome.result()[0].close()


def _connected(way: Way, limit: float) -> SocketTransport:
    countdown, place = Countdown(limit), way.place
    try:
        if isinstance(place, SshPlace):
            return SshTransport(way, place)
        if isinstance(place, UnixPlace):
            sock = connect_unix(place.path, countdown)
        else:
            sock = connect_tcp(place.host, place.port, countdown)
    except TimeoutError as error:
        raise OSError(errno.ETIMEDOUT, f"no answer within {limit:g} s") from error
    try:
        return SocketTransport(sock, str(place))
    except BaseException:
        sock.close()
        raise


def _encrypted(transport: SocketTransport, way: Way, deadline: float) -> Transport:
    if way.tls is None or isinstance(way.place, SshPlace):
        return transport
    host = None if isinstance(way.place, UnixPlace) else way.place.host
    encrypted = TlsTransport(transport, way.tls, server=False, host=way.hostname or host)
    encrypted.shake_hands(deadline)
    return encrypted
