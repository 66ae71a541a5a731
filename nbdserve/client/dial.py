"""Connecting a socket to a server: every address that a name has is tried, each in a bounded time.

As in RFC 8305 ("Happy Eyeballs") the next address gets its chance a moment after the one before, without
that being given up: the first that answers is used. Libraries that try one after the other wait minutes for a
dead one; libnbd 1.14 to 1.22 tries only the first that does not fail at once.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import queue
import select
import socket
import struct
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import NamedTuple, TypeVar

from nbdserve.common.threads import Thread
from nbdserve.common.uri import NbdUri

_NEXT = 0.25
"""Seconds after which the next address is tried too (RFC 8305, "Connection Attempt Delay")."""
_FIRST_PAUSE = 0.05
"""Seconds between the first two attempts to connect."""
_KEEPALIVE = (socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)
"""Seconds, and how often: a host that is gone is noticed on an idle connection, too."""
SILENT_NETWORK = 20.0
"""Seconds after which nothing that was sent has arrived at a host that is there."""
_UNACKED, _LAST_ACK_RECEIVED = 24, 56
"""Where the kernel's ``struct tcp_info`` has tcpi_unacked (packets) and tcpi_last_ack_recv (milliseconds)."""

T = TypeVar("T")


class Address(NamedTuple):
    """What a name leads to."""

    family: int
    sockaddr: tuple[str, int] | tuple[str, int, int, int]

    def __str__(self) -> str:
        return self.sockaddr[0]


@dataclass(frozen=True)
class Through:
    """An export that is reached by what somebody else connects, as a stream of a channel.

    ``dial`` returns a connected socket that does not block; OSError when there is none now.
    """

    name: str
    """What it is called in messages."""
    export: str
    dial: Callable[[], socket.socket]

    def __str__(self) -> str:
        return self.name


Target = NbdUri | Through
"""An export to connect to."""


class Countdown:
    """A time limit on silence: so many seconds without a byte, and ten times as many in all."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        begun = time.monotonic()
        self._due, self._last = begun + seconds, begun + 10 * seconds

    def moved(self) -> None:
        """Something came, or went."""
        self._due = min(time.monotonic() + self.seconds, self._last)

    @property
    def left(self) -> float:
        """Return the seconds until it is over; TimeoutError when it is."""
        left = self._due - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class Pauses:
    """The pauses between attempts to connect: each twice as long as the last, up to ``longest`` seconds.

    For one thread at a time.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self.next = _FIRST_PAUSE
        """Seconds to wait before the next attempt."""

    def grow(self) -> None:
        """Let the next one be longer: another attempt has failed."""
        self.next = min(2 * self.next, self._longest)

    def begin_anew(self) -> None:
        """Let the next one be short: an attempt has succeeded."""
        self.next = _FIRST_PAUSE


def connect_tcp(host: str, port: int, limit: Countdown) -> socket.socket:
    """Return a connected socket that does not block.

    Raises OSError with the reasons when no address of the host takes it, TimeoutError at the limit.
    """
    return race([(str(address), partial(begin, address)) for address in resolve(host, port, limit)], limit)


def connect_unix(path: str, limit: Countdown) -> socket.socket:
    """Return a connected socket that does not block; wait until the limit for the server's queue."""
    peer = socket.socket(socket.AF_UNIX)
    try:
        left = limit.left
        # A connect that does not block would fail at once on a full queue, so it blocks, under this limit.
        seconds = struct.pack("@ll", int(left), max(1, int(left % 1 * 1_000_000)))
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        try:
            peer.connect(path)
        except BlockingIOError as error:
            raise TimeoutError from error
        peer.setblocking(False)
    except BaseException:
        peer.close()
        raise
    return peer


def resolve(host: str, port: int, limit: Countdown) -> list[Address]:
    """Return a host's addresses, families in turn, as the system prefers them; OSError if none."""

    def look_up() -> list[Address]:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise OSError(errno.EINVAL, f"{host!r} is no name of a host") from error
        # Where Python was built without IPv6 an address of it has no text.
        return [Address(family, place) for family, _, _, _, place in found if isinstance(place[0], str)]

    try:
        found = in_time(look_up, f"look up {host}", limit)
    except TimeoutError:
        raise OSError(errno.EHOSTUNREACH, f"the name {host!r} could not be looked up in time") from None
    if not found:
        raise OSError(errno.EHOSTUNREACH, f"the name {host!r} has no address")
    first = [address for address in found if address.family == found[0].family]
    others = [address for address in found if address.family != found[0].family]
    return [address for address in chain(*zip_longest(first, others)) if address is not None]


def in_time(work: Callable[[], T], name: str, limit: Countdown) -> T:
    """Do ``work``, which nothing can interrupt; after TimeoutError it goes on alone."""
    outcome: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(work())
        except Exception as error:  # noqa: BLE001 - it is raised again where it is waited for
            outcome.put(error)

    Thread(run, name).start()
    try:
        result = outcome.get(timeout=limit.left)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(result, Exception):
        raise result
    return result


def begin(address: Address) -> socket.socket:
    """Return a socket that is being connected; OSError if it cannot be."""
    peer = socket.socket(address.family, socket.SOCK_STREAM)
    peer.setblocking(False)
    code = peer.connect_ex(address.sockaddr)
    if code not in (0, errno.EINPROGRESS):
        peer.close()
        raise OSError(code, os.strerror(code))
    return peer


def race(attempts: Sequence[tuple[str, Callable[[], socket.socket]]], limit: Countdown) -> socket.socket:
    """Return the first of these sockets, each with a name, to be connected; the others are closed."""
    waiting, running = list(reversed(attempts)), dict[int, tuple[str, socket.socket]]()
    failures: list[tuple[str, OSError]] = []
    # So that the last one has its time, however many there are.
    pause = min(_NEXT, limit.seconds / (2 * len(attempts)))
    poll, due = select.poll(), 0.0
    try:
        while waiting or running:
            if waiting and time.monotonic() >= due:
                name, start = waiting.pop()
                try:
                    peer = start()
                except OSError as error:
                    failures.append((name, error))
                else:
                    running[peer.fileno()] = name, peer
                    poll.register(peer, select.POLLOUT)
                    due = time.monotonic() + pause
                continue
            left = min(limit.left, due - time.monotonic()) if waiting else limit.left
            for fd, _ in poll.poll(max(0, math.ceil(left * 1000))):
                poll.unregister(fd)
                name, peer = running.pop(fd)
                code = peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return peer
                peer.close()
                failures.append((name, OSError(code, os.strerror(code))))
                due = 0.0
    except TimeoutError as error:
        late = OSError(errno.ETIMEDOUT, f"no answer within {limit.seconds:g} s")
        failures += [(name, late) for name, _ in running.values()]
        raise TimeoutError(errno.ETIMEDOUT, _joined(failures)) from error
    finally:
        for _, peer in running.values():
            peer.close()
    raise OSError(failures[-1][1].errno, _joined(failures))


def tune(fd: int) -> None:
    """Let what is sent go out at once, and let the kernel look whether an idle TCP peer is still there."""
    with socket.socket(fileno=os.dup(fd)) as peer:
        if peer.family in (socket.AF_INET, socket.AF_INET6):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE:
                peer.setsockopt(socket.IPPROTO_TCP, option, value)


def unsent(fd: int) -> int:
    """Tell how many bytes a socket still holds that the other end has not taken (TCP: not acknowledged)."""
    (count,) = struct.unpack("@i", fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)))
    return int(count)


def is_cut_off(fd: int) -> bool:
    """Tell whether the host at the other end has acknowledged nothing of what was sent, for 20 s or longer.

    For who has waited that long: a host that is there acknowledges at once, however slow its server is.
    """
    with socket.socket(fileno=os.dup(fd)) as peer:
        if peer.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        told = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_ACK_RECEIVED + 4)
    (unacked,) = struct.unpack_from("@I", told, _UNACKED)
    (since,) = struct.unpack_from("@I", told, _LAST_ACK_RECEIVED)
    return bool(unacked) and since / 1000 >= SILENT_NETWORK


def _joined(failures: Sequence[tuple[str, OSError]]) -> str:
    """All reasons in one line; which address had which, where there are several."""
    if len(failures) == 1:
        return str(failures[0][1].strerror)
    return "; ".join(f"{name}: {error.strerror}" for name, error in failures)
