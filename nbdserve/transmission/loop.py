"""The transmission phase of one client: requests in, replies out, many of each with one system call.

A short plain read or write (of 4 KiB, say) is served by ``_serve_received`` and the backend's ``read_now`` or
``write_now`` alone. All else is a Command (commands.py), done by this thread or offloaded to a worker
(offload.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from nbdserve.backends.base import Backend
from nbdserve.common.errors import ProtocolError
from nbdserve.protocol.constants import Command, CommandFlags, NbdError, TransmissionFlags
from nbdserve.protocol.framing import Request, framing_of
from nbdserve.protocol.offers import Agreement, Mode
from nbdserve.protocol.requests import CHANGING, choose_contexts, refusal, without_payload
from nbdserve.transmission.busy_polling import BusyPolling
from nbdserve.transmission.byte_stream import Stream
from nbdserve.transmission.commands import WORTH_SPLICING, Commands
from nbdserve.transmission.offload import Offload
from nbdserve.transmission.payloads import Payloads
from nbdserve.transmission.receive_buffer import ReceiveBuffer
from nbdserve.transmission.reply_buffer import CAPACITY, ReplyBuffer
from nbdserve.transmission.traffic import Traffic
from nbdserve.transmission.unfinished_writes import Changes
from nbdserve.transmission.workers import Crew

_LOG = logging.getLogger("nbdserve")

MAX_STATUS_PAYLOAD = 4096
"""The longest payload of a block status request in bytes; no export has so many contexts."""


class Transmission:
    """Serves one client until it disconnects.

    ``early`` is what the client sent together with its last option. Its requests are counted in ``traffic``.
    ``busy_polling`` waits for the next ones while all could be answered here. ``changes`` says whether it
    may still change the disk. ``lost`` is called with the reason, from any thread, when the client can be
    sent nothing any more: it must end the connection.
    """

    def __init__(
        self,
        stream: Stream,
        agreement: Agreement,
        backend: Backend,
        early: bytes,
        crew: Crew,
        traffic: Traffic | None = None,
        busy_polling: BusyPolling | None = None,
        changes: Changes | None = None,
        lost: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._agreement = agreement
        self._backend = backend
        self._framing = framing_of(agreement)
        self._traffic = traffic = traffic or Traffic()
        self._in_line = (0, 0)
        self._commands = Commands(agreement, self._framing, backend, traffic)
        self._receive_buffer = ReceiveBuffer(stream, early, self._framing.request.size)
        self._reply_buffer = ReplyBuffer(stream, backend.log_writes, lost)
        self._payloads = Payloads(self._receive_buffer, self._reply_buffer)
        self._changes = changes = changes or Changes(lambda: None)
        self._near = Offload(crew.near, self._reply_buffer, self._framing, changes, traffic)
        self._far = Offload(crew.far, self._reply_buffer, self._framing, changes, traffic)
        self._busy_polling = busy_polling
        self._finish_by: float | None = None
        self._received = time.perf_counter()
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
            self._serve_received()
            self._reply_buffer.flush()
        except ProtocolError:
            # What came before the nonsense was in order, and is answered.
            self._reply_buffer.flush()
            raise
        finally:
            self._changes.end()
            self._near.wait_until_none()
            self._far.wait_until_none()
            self._reply_buffer.close()
            self._payloads.close()

    def _serve_received(self) -> None:
        """Answer what has been received, receive more, and so on until the client says goodbye or goes away.

        This is the hot loop. Short plain reads and writes, nearly all of the traffic, are served without
        leaving it unless they have to wait: what is read goes from the backend straight to its place behind
        the reply's header, what is written straight from where it was received. Everything is a local name,
        as attribute look-ups cost about a tenth of a small read.
        """
        receive_buffer, reply_buffer, framing = self._receive_buffer, self._reply_buffer, self._framing
        unpack, header, expected = framing.request.unpack_from, framing.request.size, framing.request_magic
        put_data_head, head = framing.put_data_head, framing.data_head
        put_success, success = framing.put_success, framing.success_head
        received, payloads, out, view = (
            receive_buffer.buffer,
            receive_buffer.view,
            reply_buffer.buffer,
            reply_buffer.view,
        )
        capacity, size = reply_buffer.capacity, self._agreement.offer.size
        read_now, write_now, writable = self._backend.read_now, self._backend.write_now, self._writable
        changes = self._changes
        while True:
            reads = read_bytes = writes = written = 0
            changing = False
            position, end = receive_buffer.start, receive_buffer.end
            while end - position >= header:
                magic, flags, command, cookie, offset, length = unpack(received, position)
                if magic != expected:
                    raise ProtocolError(f"a request starts with {magic:#010x} instead of {expected:#010x}")
                position += header
                if not flags and 0 < length < WORTH_SPLICING and offset + length <= size:
                    start = reply_buffer.used
                    try:
                        if command == 0:  # READ; looking up the enumeration's member costs a tenth, too
                            stop = start + head + length
                            if changing:
                                changing = changes.end()
                            if stop > capacity:
                                reply_buffer.flush()
                                start, stop = 0, head + length
                            if read_now(offset, view[start + head : stop]):
                                put_data_head(out, start, cookie, offset, offset, length)
                                reply_buffer.used = stop
                                reads += 1
                                read_bytes += length
                                continue
                        elif command == 1 and writable:  # WRITE
                            if end - position < length:
                                # The rest is received in one go with what follows it.
                                position -= header
                                break
                            stop = start + success
                            if stop > capacity:
                                changing = changes.end()
                                reply_buffer.flush()
                                start, stop = 0, success
                            payload = payloads[position : position + length]
                            position += length
                            if not changing or changes.stopped:
                                changing = changes.begin()
                            if write_now(offset, payload):
                                put_success(out, start, cookie, offset)
                                reply_buffer.used = stop
                                writes += 1
                                written += length
                                continue
                            position -= length
                    except OSError as error:
                        request = Request(flags, command, cookie, offset, length)
                        reply_buffer.add(self._commands.failure(request, error))
                        self._traffic.requests[command] += 1
                        continue
                receive_buffer.start = position
                if changing:
                    changing = changes.end()
                if command == Command.DISC:
                    self._count_in_line(reads, read_bytes, writes, written)
                    return
                self._dispatch(Request(flags, command, cookie, offset, length))
                # A write may have received more.
                position, end = receive_buffer.start, receive_buffer.end
            receive_buffer.start = position
            if changing:
                changes.end()
            self._count_in_line(reads, read_bytes, writes, written)
            reply_buffer.flush()
            if not self._receive():
                return

    def _receive(self) -> bool:
        """Wait for more; False when there is no more, or none shall be taken any more."""
        if self._traffic.timed:
            self._time_in_line(time.perf_counter() - self._received)
        if self._finish_by is not None and time.monotonic() >= self._finish_by:
            return False
        if self._busy_polling is not None and any(self._in_line):
            self._busy_polling.begin()
            goes_on = self._receive_buffer.receive()
            self._busy_polling.end()
        else:
            goes_on = self._receive_buffer.receive()
        self._received = time.perf_counter()
        return goes_on

    def _count_in_line(self, reads: int, read_bytes: int, writes: int, written: int) -> None:
        """Count what one round of the hot loop has served itself."""
        self._in_line = (reads, writes)
        requests, sizes = self._traffic.requests, self._traffic.bytes
        requests[0] += reads  # READ
        requests[1] += writes  # WRITE
        sizes[0] += read_bytes
        sizes[1] += written

    def _time_in_line(self, seconds: float) -> None:
        """They came with one system call and were answered with one, so that each took as long as all."""
        reads, writes = self._in_line
        if reads:
            self._traffic.took(Command.READ, seconds, reads)
        if writes:
            self._traffic.took(Command.WRITE, seconds, writes)

    def _dispatch(self, request: Request) -> None:
        """Serve a request of any kind, and count it."""
        traffic, command = self._traffic, request.command
        if command < len(traffic.requests):
            traffic.requests[command] += 1
            if request.offset + request.length <= self._agreement.offer.size:
                traffic.bytes[command] += request.length
        began = time.perf_counter()
        if self._serve(request) and traffic.timed:
            traffic.took(command, time.perf_counter() - began)

    def _serve(self, request: Request) -> bool:
        """Serve a request here, or hand it to the workers and return False."""
        if request.command == Command.WRITE:
            return self._write(request)
        if request.flags & CommandFlags.PAYLOAD_LEN and self._agreement.mode is Mode.EXTENDED:
            return self._with_payload(request)
        if refused := refusal(self._agreement, request):
            self._refuse(request, *refused)
        elif self._backend.is_local(Command(request.command), request.offset, request.length):
            self._serve_here(request)
        else:
            offload = self._offload(request)
            offload.admit(request)
            offload.submit(request, lambda replies: self._commands.serve(request, replies))
            return False
        return True

    def _offload(self, request: Request) -> Offload:
        """The way of a request that has to wait: what may hang with another server has one of its own."""
        command = Command(request.command)
        is_far = self._backend.needs_network(command, request.offset, request.length)
        return self._far if is_far else self._near

    def _serve_here(self, request: Request) -> None:
        if request.command in CHANGING:
            with self._changes.one():
                self._commands.serve(request, self._reply_buffer)
            return
        whole = not self._framing.pieces or request.flags & CommandFlags.DF
        if request.command != Command.READ or request.length < CAPACITY or not whole:
            self._commands.serve(request, self._reply_buffer)
            return
        # Its data may have to be in memory all at once.
        self._near.admit(request)
        try:
            self._commands.serve(request, self._reply_buffer)
        finally:
            self._near.dismiss(request)

    def _refuse(self, request: Request, error: NbdError, message: str) -> None:
        self._reply_buffer.add(self._commands.refusal(request, error, message))

    def _write(self, request: Request) -> bool:
        """Consume the payload whatever happens, so that the next request is found, and store it."""
        if self._agreement.mode is Mode.EXTENDED:
            # Every write has a payload here; a client that forgets to say so is understood all the same.
            request = without_payload(request)
            self._check_payload(request)
        refused = refusal(self._agreement, request)
        if refused is not None:
            self._payloads.skip(request.length)
            self._refuse(request, *refused)
        elif not self._backend.is_local(Command.WRITE, request.offset, request.length):
            offload = self._offload(request)
            offload.admit(request)
            try:
                payload = self._payloads.collect(request.length)
            except BaseException:
                offload.dismiss(request)
                raise
            offload.submit(request, lambda replies: self._commands.store(request, payload, replies))
            return False
        elif request.length < WORTH_SPLICING:
            data = self._payloads.take(request.length)
            with self._changes.one():
                self._commands.store(request, data, self._reply_buffer)
        else:
            with self._changes.one():
                self._store_as_it_arrives(request)
        return True

    def _store_as_it_arrives(self, request: Request) -> None:
        """Serve a long write. It is acknowledged when all of it is stored."""
        try:
            self._payloads.store(self._backend, request.offset, request.length)
            if request.flags & CommandFlags.FUA:
                self._backend.flush()
        except OSError as error:
            self._reply_buffer.add(self._commands.failure(request, error))
        else:
            self._reply_buffer.add(self._framing.success(request))

    def _with_payload(self, request: Request) -> bool:
        """Serve a request other than WRITE that carries a payload: a block status of some contexts only."""
        self._check_payload(request)
        if request.length > MAX_STATUS_PAYLOAD:
            self._payloads.skip(request.length)
            chosen = None
        else:
            chosen = choose_contexts(self._agreement, request, bytes(self._payloads.collect(request.length)))
        if chosen is None:
            self._refuse(request, NbdError.EINVAL, "this payload does not fit")
            return True
        plain, contexts = chosen
        if refused := refusal(self._agreement, plain):
            self._refuse(request, *refused)
            return True
        offload = self._offload(plain)
        offload.admit(plain)
        offload.submit(plain, lambda replies: self._commands.block_status(plain, contexts, replies))
        return False

    def _check_payload(self, request: Request) -> None:
        """Give up a client whose extended header announces more than any request may carry.

        There its length has 64 bits, and is not worth skipping ("Extended headers", "Request message").
        """
        if request.length > self._agreement.offer.block_sizes.maximum:
            raise ProtocolError(f"request type {request.command} with a payload of {request.length} bytes")
