"""The transmission phase of one client: requests in, replies out, many of each with one system call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from nbdserve.backends.base import Backend
from nbdserve.commands import PIECE, Commands
from nbdserve.errors import ConnectionLostError, ProtocolError
from nbdserve.inbox import Inbox
from nbdserve.outbox import Outbox
from nbdserve.protocol.constants import Command, CommandFlags, NbdError, TransmissionFlags
from nbdserve.protocol.framing import Request, framing_of
from nbdserve.protocol.offers import Agreement, Mode
from nbdserve.protocol.requests import choose_contexts, refusal
from nbdserve.stream import Stream
from nbdserve.workers import InFlight, Workers

_LOG = logging.getLogger("nbdserve")

MAX_IN_FLIGHT = 64
"""Requests of one client that may be with the workers at a time."""

_SMALL_REPLY = 4096
"""Room in bytes for the reply to a request that a worker serves, besides the data of a read."""


class Transmission:
    """Serves one client until it disconnects.

    ``early`` is what the client sent together with its last option.
    """

    def __init__(
        self, stream: Stream, agreement: Agreement, backend: Backend, early: bytes, workers: Workers
    ) -> None:
        self._agreement = agreement
        self._backend = backend
        self._framing = framing_of(agreement)
        self._commands = Commands(agreement, self._framing, backend)
        self._inbox = Inbox(stream, early)
        self._outbox = Outbox(stream)
        self._workers = workers
        self._in_flight = InFlight(MAX_IN_FLIGHT)
        self._finish_by: float | None = None
        # The longest request that the hot loop serves itself: none where a read could wait for a network.
        self._short = PIECE if backend.always_local else -1
        self._writable = not agreement.offer.flags & TransmissionFlags.READ_ONLY

    def finish_by(self, deadline: float) -> None:
        """Take no more after ``time.monotonic()`` has reached the deadline. May be called from any thread."""
        self._finish_by = deadline

    def run(self) -> None:
        """Serve until DISC or the end of the stream, and until every request is answered.

        ProtocolError when the client sends what cannot be understood; ConnectionLostError when it goes away
        in the middle of a request or of a reply.
        """
        try:
            while self._answer_received():
                self._outbox.flush()
                if self._finish_by is not None and time.monotonic() >= self._finish_by:
                    break
                if not self._inbox.receive():
                    break
            self._outbox.flush()
        except ProtocolError:
            # What came before the nonsense was in order, and is answered.
            self._outbox.flush()
            raise
        finally:
            # An old write must not land after this client has come back with a newer one.
            self._in_flight.wait_until_none()

    def _answer_received(self) -> bool:
        """Answer every request that has been received whole; False when the client said goodbye.

        This is the hot loop. Plain reads and writes, nearly all of the traffic, are served without leaving
        it: what is read goes from the backend straight to its place behind the reply's header, what is
        written straight from where it was received. Everything is a local name, as attribute look-ups cost
        about a tenth of a small read.
        """
        inbox, outbox, framing = self._inbox, self._outbox, self._framing
        unpack, header, expected = framing.request.unpack_from, framing.request.size, framing.request_magic
        put_data_head, head = framing.put_data_head, framing.data_head
        put_success, success = framing.put_success, framing.success_head
        received, payloads, out, view = inbox.buffer, inbox.view, outbox.buffer, outbox.view
        capacity, short, size = outbox.capacity, self._short, self._agreement.offer.size
        read_into, write, writable = self._backend.read_into, self._backend.write, self._writable
        position, end = inbox.start, inbox.end
        while end - position >= header:
            magic, flags, command, cookie, offset, length = unpack(received, position)
            if magic != expected:
                raise ProtocolError(f"a request starts with {magic:#010x} instead of {expected:#010x}")
            position += header
            if not flags and 0 < length <= short and offset + length <= size:
                start = outbox.used
                try:
                    if command == 0:  # READ; looking up the enumeration's member costs a tenth, too
                        stop = start + head + length
                        if stop > capacity:
                            outbox.flush()
                            start, stop = 0, head + length
                        read_into(offset, view[start + head : stop])
                        put_data_head(out, start, cookie, offset, offset, length)
                        outbox.used = stop
                        continue
                    if command == 1 and writable and end - position >= length:  # WRITE
                        stop = start + success
                        if stop > capacity:
                            outbox.flush()
                            start, stop = 0, success
                        payload = payloads[position : position + length]
                        position += length
                        write(offset, payload, False)
                        put_success(out, start, cookie, offset)
                        outbox.used = stop
                        continue
                except OSError as error:
                    request = Request(flags, command, cookie, offset, length)
                    outbox.add(self._commands.failure(request, error))
                    continue
            inbox.start = position
            if command == Command.DISC:
                return False
            self._dispatch(Request(flags, command, cookie, offset, length))
            # A write may have received more.
            position, end = inbox.start, inbox.end
        inbox.start = position
        return True

    def _dispatch(self, request: Request) -> None:
        """Serve a request of any kind, here or with the workers."""
        if request.command == Command.WRITE:
            self._write(request)
        elif request.flags & CommandFlags.PAYLOAD_LEN and self._agreement.mode is Mode.EXTENDED:
            self._with_payload(request)
        elif refused := refusal(self._agreement, request):
            self._outbox.add(self._framing.error(request, *refused))
        elif self._backend.is_local(Command(request.command), request.offset, request.length):
            self._commands.serve(request, self._outbox)
        else:
            self._hand_over(request, lambda replies: self._commands.serve(request, replies))

    def _write(self, request: Request) -> None:
        """Consume the payload whatever happens, so that the next request is found, and store it."""
        if self._agreement.mode is Mode.EXTENDED:
            # Every write has a payload here; a client that forgets to say so is understood all the same.
            request = request._replace(flags=request.flags & ~CommandFlags.PAYLOAD_LEN)
        refused = refusal(self._agreement, request)
        if refused is not None:
            self._skip(request.length)
            self._outbox.add(self._framing.error(request, *refused))
        elif not self._backend.is_local(Command.WRITE, request.offset, request.length):
            payload = self._collect(request.length)
            self._hand_over(request, lambda replies: self._commands.store(request, payload, replies))
        elif request.length <= PIECE:
            self._commands.store(request, self._payload(request.length), self._outbox)
        else:
            self._store_in_pieces(request)

    def _store_in_pieces(self, request: Request) -> None:
        """Store a long write as it arrives. It is acknowledged when all of it is stored."""
        position, end = request.offset, request.offset + request.length
        try:
            while position < end:
                piece = self._payload(min(PIECE, end - position))
                position += len(piece)
                self._backend.write(position - len(piece), piece, fua=False)
            if request.flags & CommandFlags.FUA:
                self._backend.flush()
        except OSError as error:
            self._skip(end - position)
            self._outbox.add(self._commands.failure(request, error))
        else:
            self._outbox.add(self._framing.success(request))

    def _with_payload(self, request: Request) -> None:
        """Serve a request other than WRITE that carries a payload: a block status of some contexts only."""
        if request.length > self._agreement.offer.block_sizes.maximum:
            raise ProtocolError(f"request type {request.command} with a payload of {request.length} bytes")
        chosen = choose_contexts(self._agreement, request, bytes(self._collect(request.length)))
        if chosen is None:
            self._outbox.add(self._framing.error(request, NbdError.EINVAL, "this payload does not fit"))
            return
        plain, contexts = chosen
        if refused := refusal(self._agreement, plain):
            self._outbox.add(self._framing.error(request, *refused))
        else:
            self._hand_over(plain, lambda replies: self._commands.block_status(plain, contexts, replies))

    def _payload(self, length: int) -> memoryview:
        """Receive and consume up to PIECE bytes; valid until the next call."""
        if not self._inbox.holds(length):
            # What was answered already shall not wait for a payload that takes its time.
            self._outbox.flush()
        return self._inbox.take(length)

    def _collect(self, length: int) -> bytearray:
        """Receive and consume a whole payload."""
        payload = bytearray(length)
        for position in range(0, length, PIECE):
            stop = min(position + PIECE, length)
            payload[position:stop] = self._payload(stop - position)
        return payload

    def _skip(self, length: int) -> None:
        """Receive and forget a payload."""
        while length:
            length -= len(self._payload(min(length, PIECE)))

    def _hand_over(self, request: Request, serve: Callable[[Outbox], None]) -> None:
        """Let a worker serve the request; its reply goes out when it is ready."""
        self._outbox.flush()
        self._in_flight.begin()
        data = request.length if request.command == Command.READ else 0
        self._workers.submit(lambda: self._serve_elsewhere(serve, min(data, PIECE)))

    def _serve_elsewhere(self, serve: Callable[[Outbox], None], data: int) -> None:
        try:
            replies = self._outbox.beside(_SMALL_REPLY + data)
            serve(replies)
            replies.flush()
        except ConnectionLostError as error:
            # The connection's own thread notices too, and ends the connection.
            _LOG.debug("%s", error)
        finally:
            self._in_flight.end()
