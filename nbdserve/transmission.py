"""The transmission phase of one client: requests in, replies out, many of each with one system call."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from nbdserve.backends.base import Backend
from nbdserve.errors import ConnectionLostError, ProtocolError
from nbdserve.outbox import CAPACITY, Outbox
from nbdserve.protocol.constants import (
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Command,
    CommandFlags,
    ReplyFlags,
    ReplyType,
)
from nbdserve.protocol.extents import descriptors
from nbdserve.protocol.messages import (
    DATA_CHUNK,
    REQUEST,
    SIMPLE_REPLY,
    block_status,
    chunk,
    refusal,
    wire_error,
)
from nbdserve.protocol.offers import Agreement

INBOX = 512 << 10
"""The size of the receive buffer in bytes; the payload of a longer write passes through it in pieces."""

PIECE = 256 << 10
"""Bytes of a long read that are read and sent at a time: small enough to stay in the processor's cache."""

_DATA = int(ReplyType.OFFSET_DATA)
_DONE = int(ReplyFlags.DONE)

MAX_EXTENTS = 8192
"""The most extents that one block status reply tells of: 64 KiB of descriptors."""


class Transmission:
    """Serves one client until it disconnects.

    ``early`` is what the client sent together with its last option.
    """

    def __init__(self, sock: socket.socket, agreement: Agreement, backend: Backend, early: bytes) -> None:
        self._sock = sock
        self._agreement = agreement
        self._backend = backend
        self._outbox = Outbox(sock, agreement)
        self._inbox = bytearray(max(INBOX, len(early)))
        self._view = memoryview(self._inbox)
        self._inbox[: len(early)] = early
        self._start = 0
        self._end = len(early)
        self._finish_by: float | None = None
        self._handlers: dict[int, Callable[[int, int, int, int], None]] = {
            Command.READ: self._read,
            Command.FLUSH: self._flush,
            Command.TRIM: self._trim,
            Command.CACHE: self._cache,
            Command.WRITE_ZEROES: self._write_zeroes,
            Command.BLOCK_STATUS: self._block_status,
        }

    def finish_by(self, deadline: float) -> None:
        """Take no more after ``time.monotonic()`` has reached the deadline. May be called from any thread."""
        self._finish_by = deadline

    def run(self) -> None:
        """Serve until DISC or the end of the stream.

        ProtocolError when the client sends what cannot be understood; ConnectionLostError when it goes away
        in the middle of a request or of a reply.
        """
        while self._answer_received():
            self._outbox.flush()
            if not self._receive():
                return
        self._outbox.flush()

    def _receive(self) -> bool:
        """Wait for more, for ever if the client owes nothing; False at the end of the stream."""
        self._compact()
        if self._finish_by is not None and time.monotonic() >= self._finish_by:
            return False
        while True:
            try:
                count = self._sock.recv_into(self._view[self._end :])
            except BlockingIOError as error:
                if self._end:
                    raise ConnectionLostError("the client sent half a request and fell silent") from error
                continue
            except OSError as error:
                raise ConnectionLostError(f"the client is gone: {error.strerror or error}") from error
            if not count and self._end:
                raise ConnectionLostError("the client went away in the middle of a request")
            self._end += count
            return count > 0

    def _compact(self) -> None:
        """Move what is left to the front of the inbox."""
        left = self._end - self._start
        if self._start:
            self._inbox[:left] = self._inbox[self._start : self._end]
            self._start, self._end = 0, left

    def _payload(self, length: int) -> memoryview:
        """Receive and consume the next ``length`` bytes, at most PIECE; valid until the next call."""
        if self._start + length > INBOX:
            self._compact()
        if self._end - self._start < length:
            # What was answered already shall not wait for a payload that takes its time.
            self._outbox.flush()
        while self._end - self._start < length:
            try:
                stop = self._start + length
                count = self._sock.recv_into(self._view[self._end : stop], 0, socket.MSG_WAITALL)
            except OSError as error:
                raise ConnectionLostError(
                    f"the client left a write half sent: {error.strerror or error}"
                ) from error
            if not count:
                raise ConnectionLostError("the client went away in the middle of a write")
            self._end += count
        self._start += length
        return self._view[self._start - length : self._start]

    def _answer_received(self) -> bool:
        """Answer every request that has been received whole; False when the client said goodbye.

        This is the hot loop. A read, the commonest request, is served without leaving it: the data goes from
        the backend straight to its place behind the reply's header. Everything is a local name, as attribute
        look-ups cost about a tenth of a small read.
        """
        inbox, unpack, header = self._inbox, REQUEST.unpack_from, REQUEST.size
        outbox, out, view = self._outbox, self._outbox.buffer, self._outbox.view
        read_into = self._backend.read_into
        size = self._agreement.offer.size
        structured = self._agreement.structured
        head = DATA_CHUNK.size if structured else SIMPLE_REPLY.size
        pack_data, pack_simple = DATA_CHUNK.pack_into, SIMPLE_REPLY.pack_into
        position, end = self._start, self._end
        while end - position >= header:
            magic, flags, command, cookie, offset, length = unpack(inbox, position)
            if magic != REQUEST_MAGIC:
                raise ProtocolError(f"a request starts with {magic:#010x} instead of the request magic")
            position += header
            # READ is 0 and so is "no flags": one comparison finds the plain read that fits the buffer.
            if not command | flags and 0 < length <= PIECE and offset + length <= size:
                start = outbox.used
                stop = start + head + length
                if stop > CAPACITY:
                    outbox.flush()
                    start, stop = 0, head + length
                try:
                    read_into(offset, view[start + head : stop])
                except OSError as error:
                    outbox.error(cookie, wire_error(error.errno), error.strerror or str(error))
                    continue
                if structured:
                    pack_data(out, start, STRUCTURED_REPLY_MAGIC, _DONE, _DATA, cookie, length + 8, offset)
                else:
                    pack_simple(out, start, SIMPLE_REPLY_MAGIC, 0, cookie)
                outbox.used = stop
                continue
            self._start = position
            if command == Command.DISC:
                return False
            self._dispatch(flags, command, cookie, offset, length)
            # A write may have received more.
            position, end = self._start, self._end
        self._start = position
        return True

    def _dispatch(self, flags: int, command: int, cookie: int, offset: int, length: int) -> None:
        """Serve one request of any kind; its reply, or its error, is in the outbox afterwards."""
        refused = refusal(self._agreement, command, flags, offset, length)
        try:
            if command == Command.WRITE:
                self._write(flags, cookie, offset, length, refused is None)
            if refused is not None:
                self._outbox.error(cookie, *refused)
            elif command != Command.WRITE:
                self._handlers[command](flags, cookie, offset, length)
        except OSError as error:
            self._outbox.error(cookie, wire_error(error.errno), error.strerror or str(error))

    def _write(self, flags: int, cookie: int, offset: int, length: int, store: bool) -> None:
        """Consume the payload whatever happens, so that the next request is found; store it if ``store``.

        A long write is stored in pieces as they arrive. It is acknowledged when all of it is stored.
        """
        whole = length <= PIECE
        fua = bool(flags & CommandFlags.FUA)
        failure: OSError | None = None
        position = offset
        while length:
            piece = self._payload(min(length, PIECE))
            length -= len(piece)
            if store and failure is None:
                try:
                    self._backend.write(position, piece, fua and whole)
                except OSError as error:
                    failure = error
            position += len(piece)
        if failure is not None:
            raise failure
        if store:
            if fua and not whole:
                self._backend.flush()
            self._outbox.done(cookie)

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        """Serve a read that the hot loop left: long, empty or with flags."""
        if not self._agreement.structured:
            self._read_whole(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie), offset, length)
        elif not length:
            self._outbox.add(chunk(cookie, ReplyType.NONE))
        elif flags & CommandFlags.DF:
            header = DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, _DONE, _DATA, cookie, length + 8, offset)
            self._read_whole(header, offset, length)
        else:
            self._read_in_pieces(cookie, offset, length)

    def _read_whole(self, header: bytes, offset: int, length: int) -> None:
        """Read everything before the first byte of the reply goes out: after that no error can be told."""
        reply = bytearray(len(header) + length)
        reply[: len(header)] = header
        view = memoryview(reply)
        self._backend.read_into(offset, view[len(header) :])
        self._outbox.add(view)

    def _read_in_pieces(self, cookie: int, offset: int, length: int) -> None:
        """Answer in several chunks; an error becomes the last of them."""
        outbox = self._outbox
        end = offset + length
        while offset < end:
            piece = min(PIECE, end - offset)
            start = outbox.reserve(DATA_CHUNK.size + piece)
            stop = start + DATA_CHUNK.size + piece
            self._backend.read_into(offset, outbox.view[start + DATA_CHUNK.size : stop])
            done = _DONE if offset + piece == end else 0
            DATA_CHUNK.pack_into(
                outbox.buffer, start, STRUCTURED_REPLY_MAGIC, done, _DATA, cookie, piece + 8, offset
            )
            outbox.used = stop
            outbox.flush()
            offset += piece

    def _flush(self, flags: int, cookie: int, offset: int, length: int) -> None:
        # A flush can take long; what was answered already shall not wait for it.
        self._outbox.flush()
        self._backend.flush()
        self._outbox.done(cookie)

    def _trim(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._backend.trim(offset, length, bool(flags & CommandFlags.FUA))
        self._outbox.done(cookie)

    def _cache(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._backend.cache(offset, length)
        self._outbox.done(cookie)

    def _write_zeroes(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._backend.zero(
            offset,
            length,
            fua=bool(flags & CommandFlags.FUA),
            may_trim=not flags & CommandFlags.NO_HOLE,
            fast=bool(flags & CommandFlags.FAST_ZERO),
        )
        self._outbox.done(cookie)

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        limit = 1 if flags & CommandFlags.REQ_ONE else MAX_EXTENTS
        # All are looked up before the first is sent, so that an error stands alone.
        statuses = [
            (identifier, descriptors(self._backend.extents(offset, length, context), limit=limit))
            for identifier, context in self._agreement.contexts
        ]
        last = statuses[-1][0]
        for identifier, extents in statuses:
            self._outbox.add(block_status(cookie, identifier, extents, done=identifier == last))
