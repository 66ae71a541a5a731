"""Requests that wait for a network or a disk: on their way to the workers, and their replies back."""

from __future__ import annotations

import time
from collections.abc import Callable

from nbdserve.common.errors import ConnectionLostError
from nbdserve.protocol.constants import Command, NbdError
from nbdserve.protocol.framing import Framing, Request
from nbdserve.protocol.requests import CHANGING
from nbdserve.transmission.reply_buffer import Parcel, Replies, ReplyBuffer
from nbdserve.transmission.traffic import Traffic
from nbdserve.transmission.unfinished_writes import Changes
from nbdserve.transmission.workers import InFlight, Workers

MAX_IN_FLIGHT = 64
"""Requests of one client that may be with the workers at a time."""

MAX_BYTES_IN_FLIGHT = 64 << 20
"""Bytes of memory that those may hold, or one alone that needs more."""

_SMALL_REPLY = 4096
"""Room in bytes for a reply, besides the data of a read."""

Serve = Callable[[Replies], None]
"""Serves a request and puts the reply where it is told."""


class Offload:
    """One client's requests with the workers, which send the replies through its reply_buffer.

    A worker never waits for a client that does not take its replies: it leaves them to whoever already does.
    """

    def __init__(
        self,
        workers: Workers,
        reply_buffer: ReplyBuffer,
        framing: Framing,
        changes: Changes,
        traffic: Traffic,
    ) -> None:
        self._workers = workers
        self._changes = changes
        self._reply_buffer = reply_buffer
        self._framing = framing
        self._traffic = traffic
        self._in_flight = InFlight(MAX_IN_FLIGHT, MAX_BYTES_IN_FLIGHT, workers.memory)

    def admit(self, request: Request) -> None:
        """Wait until there is room for the request; what was answered goes out before.

        ConnectionLostError when the client was lost meanwhile.
        """
        self._reply_buffer.flush()
        self._in_flight.begin(_memory_for(request))
        if self._reply_buffer.lost:
            self.dismiss(request)
            self._reply_buffer.require()

    def dismiss(self, request: Request) -> None:
        """An admitted request is over."""
        self._in_flight.end(_memory_for(request))

    def submit(self, request: Request, serve: Serve) -> None:
        """Let a worker serve an admitted request; its reply goes out when it is ready.

        ConnectionLostError when it is a change, and none must begin any more.
        """
        if request.command in CHANGING:
            try:
                self._changes.hand_over()
            except ConnectionLostError:
                self.dismiss(request)
                raise
        began = time.perf_counter()
        self._workers.submit(lambda: self._serve(request, serve, began))

    def wait_until_none(self) -> None:
        """Wait until every request is answered, or its client lost."""
        self._in_flight.wait_until_none()

    def _serve(self, request: Request, serve: Serve, began: float) -> None:
        def over() -> None:
            if self._traffic.timed:
                self._traffic.took(request.command, time.perf_counter() - began)
            self.dismiss(request)

        changing = request.command in CHANGING
        if self._changes.stopped if changing else self._reply_buffer.lost:
            # Nobody waits for it any more, and others may.
            if changing:
                self._changes.done()
            self.dismiss(request)
            return
        try:
            content = self._reply(request, serve)
        except BaseException as error:
            # Nothing of a reply has been sent: the client is told, and not left waiting for ever.
            number = NbdError.ENOMEM if isinstance(error, MemoryError) else NbdError.EIO
            self._traffic.failed(request.command)
            content = memoryview(self._framing.error(request, number, "the server could not finish this"))
            raise
        finally:
            if changing:
                self._changes.done()
            self._reply_buffer.post(content, over)

    def _reply(self, request: Request, serve: Serve) -> memoryview:
        data = request.length if request.command == Command.READ else 0
        reply = Parcel(self._framing.data_head + data + _SMALL_REPLY)
        serve(reply)
        return reply.content()


def _memory_for(request: Request) -> int:
    """The bytes of memory that a request holds: its payload, or the data of its reply."""
    data = request.length if request.command in (Command.READ, Command.WRITE) else 0
    return data + _SMALL_REPLY
