"""The door of the destination: who connects is let in when he has proven that he knows the token, in time."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nbdserve.channel.terms import Limits
from nbdserve.channel.transports import SocketTransport, TlsTransport, Transport, converse
from nbdserve.channel.wire.greeting import NONCE, Acceptor, Answer, Claim, Offer
from nbdserve.common.errors import OperatorError, reason_of
from nbdserve.common.threads import Thread
from nbdserve.connection.accepting import ACCEPT_PAUSE, AcceptFailures
from nbdserve.connection.listeners import Listener, Visitor

_LOG = logging.getLogger("nbdserve")
_GO = 1.0
"""Seconds in which who was hung up on has gone."""


@dataclass(frozen=True)
class Admission:
    """Somebody who has proven himself, and was accepted."""

    transport: Transport
    claim: Claim
    answer: Answer


class Door:
    """Listens; ``decide`` is asked of who has proven himself, and ``enter`` called with who was accepted.

    Each in a thread of the one that it is about.
    """

    def __init__(
        self,
        listeners: Sequence[Listener],
        token: bytes,
        tls: ssl.SSLContext | None,
        limits: Limits,
        offer: Offer,
        decide: Callable[[Claim], Answer],
        enter: Callable[[Admission], None],
    ) -> None:
        self._listeners = listeners
        self._token = token
        self._tls = tls
        self._limits = limits
        self._offer = offer
        self._decide = decide
        self._enter = enter
        self._lock = threading.Lock()
        """Held for moments only: who has not proven himself yet, with his thread, the first to come first."""
        self._unproven: dict[socket.socket, Thread] = {}
        self._failures = AcceptFailures()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)
        self._closed = False
        self._thread = Thread(self._listen, "channel")

    def start(self) -> None:
        """Listen from now on. OSError when there are no threads."""
        self._thread.start()

    def close(self) -> None:
        """Listen no more."""
        if not self._closed:
            self._closed = True
            os.eventfd_write(self._bell, 1)
            if self._thread.ident is not None:
                self._thread.join()
            os.close(self._bell)
            for listener in self._listeners:
                listener.close()

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        by_fd = {listener.sock.fileno(): listener for listener in self._listeners}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while not self._closed:
            for fd, _ in poll.poll():
                if fd in by_fd:
                    self._accept(by_fd[fd])

    def _accept(self, listener: Listener) -> None:
        try:
            visitor = listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            if self._failures.is_news(error):
                _LOG.warning("channel: %s: cannot accept anybody: %s", listener, reason_of(error))
            time.sleep(ACCEPT_PAUSE)
            return
        try:
            self._make_room()
            thread = Thread(self._meet, "greeting", visitor)
            with self._lock:
                self._unproven[visitor.sock] = thread
            thread.start()
        except OSError as error:
            _LOG.warning("channel: %s: closed: %s", visitor.name, reason_of(error))
            self._is_proven(visitor.sock)
            visitor.sock.close()

    def _make_room(self) -> None:
        """Hang up on the first of many who have not proven themselves: strangers keep nobody out.

        OSError when that one does not go.
        """
        with self._lock:
            if len(self._unproven) < self._limits.unproven:
                return
            first, thread = next(iter(self._unproven.items()))
            with contextlib.suppress(OSError):
                first.shutdown(socket.SHUT_RDWR)
        thread.join(_GO)
        if thread.is_alive():
            raise OSError(errno.EBUSY, f"{self._limits.unproven} others prove themselves")

    def _is_proven(self, sock: socket.socket) -> None:
        """He has proven himself, or has not, and takes no place any more."""
        with self._lock:
            self._unproven.pop(sock, None)

    def _meet(self, visitor: Visitor) -> None:
        try:
            admission = self._greet(visitor)
        except (OperatorError, OSError) as error:
            text = reason_of(error)
            name = "" if visitor.name in text else f"{visitor.name}: "
            _LOG.warning("channel: %s%s", name, text)
            visitor.sock.close()
            return
        finally:
            self._is_proven(visitor.sock)
        if admission is not None:
            self._enter(admission)

    def _greet(self, visitor: Visitor) -> Admission | None:
        """Greet somebody; None where he was refused. Raises OperatorError and OSError."""
        deadline = time.monotonic() + self._limits.greeting
        transport: Transport = SocketTransport(visitor.sock, visitor.name)
        if self._tls is not None:
            assert isinstance(transport, SocketTransport)
            transport = TlsTransport(transport, self._tls, server=True)
            transport.shake_hands(deadline)
        greeting = Acceptor(self._token, secrets.token_bytes(NONCE), self._offer, self._decide)
        converse(transport, greeting, deadline)
        assert greeting.answer is not None
        refusal = greeting.answer.refusal
        if refusal is None and greeting.claim is not None:
            return Admission(transport, greeting.claim, greeting.answer)
        _LOG.warning("channel: %s: refused: %s", visitor.name, greeting.answer.text or _WORDS)
        transport.finish()
        transport.close()
        return None


_WORDS = "it does not know the token"
