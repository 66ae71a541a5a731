"""What each command does to a backend, and the reply to it: the part of serving that is no hot loop.

A plain read or write of less than WORTH_SPLICING bytes comes here only where the backend cannot answer it at
once: loop.py (``_serve_received``) asks its ``read_now`` and ``write_now`` first, with the bytes in their
place in the reply.
"""

from __future__ import annotations

from collections.abc import Callable

from nbdserve.backends.base import Backend, Buffer
from nbdserve.protocol.block_hashes import BLOCK_HASHES, hash_runs
from nbdserve.protocol.constants import Command, CommandFlags, NbdError, ReplyFlags
from nbdserve.protocol.extents import Extent, descriptors
from nbdserve.protocol.framing import Framing, Request
from nbdserve.protocol.offers import Agreement
from nbdserve.protocol.requests import wire_error
from nbdserve.transmission.failure_log import FailureLog
from nbdserve.transmission.reply_buffer import Parcel, Replies
from nbdserve.transmission.traffic import Traffic

PIECE = 256 << 10
"""Bytes of a long read that are read and sent at a time: small enough to stay in the processor's cache."""

WORTH_SPLICING = 128 << 10
"""Bytes of a request from which on it is cheaper to pass pages on than to copy them."""

MAX_EXTENTS = 8192
"""The most extents that one block status reply tells of: 64 KiB of descriptors."""

_DONE = int(ReplyFlags.DONE)


class Commands:
    """Serves requests that have been checked. Every method may be called from several threads at once."""

    def __init__(self, agreement: Agreement, framing: Framing, backend: Backend, traffic: Traffic) -> None:
        self._agreement = agreement
        self._traffic = traffic
        self._framing = framing
        self._backend = backend
        self._failures = FailureLog(agreement.offer.name)
        self._handlers: dict[int, Callable[[Request, Replies], None]] = {
            Command.READ: self._read,
            Command.FLUSH: self._flush,
            Command.TRIM: self._trim,
            Command.CACHE: self._cache,
            Command.WRITE_ZEROES: self._write_zeroes,
            Command.BLOCK_STATUS: self._block_status,
        }

    def serve(self, request: Request, replies: Replies) -> None:
        """Serve a request without payload; a failure of the backend becomes its reply."""
        try:
            self._handlers[request.command](request, replies)
        except OSError as error:
            replies.add(self.failure(request, error))

    def block_status(self, request: Request, contexts: tuple[tuple[int, str], ...], replies: Replies) -> None:
        """Serve a block status of some of the negotiated contexts only."""
        try:
            self._send_extents(request, contexts, replies)
        except OSError as error:
            replies.add(self.failure(request, error))

    def store(self, request: Request, payload: Buffer, replies: Replies) -> None:
        """Serve a write whose whole payload is at hand."""
        try:
            self._backend.write(request.offset, payload, bool(request.flags & CommandFlags.FUA))
        except OSError as error:
            replies.add(self.failure(request, error))
        else:
            replies.add(self._framing.success(request))

    def failure(self, request: Request, error: OSError) -> bytes:
        """Return the reply to a request that the backend failed."""
        number, message = wire_error(error.errno), error.strerror or str(error)
        self._failures.tell(request, number, message)
        return self.refusal(request, number, message)

    def refusal(self, request: Request, error: NbdError, message: str) -> bytes:
        """Return the reply to a request that is not served."""
        self._traffic.failed(request.command)
        return self._framing.error(request, error, message)

    def _read(self, request: Request, replies: Replies) -> None:
        framing = self._framing
        if not request.length and framing.pieces:
            replies.add(framing.success(request))
        elif framing.pieces and not request.flags & CommandFlags.DF:
            self._read_in_pieces(request, replies)
        else:
            self._read_whole(request, replies)

    def _read_whole(self, request: Request, replies: Replies) -> None:
        """Read everything before the first byte of the reply goes out: after that no error can be told."""
        if self._splice(request, request.offset, request.length, replies, whole=True):
            return
        needed = self._framing.data_head + request.length
        if needed <= replies.capacity:
            self._add_data(request, request.offset, request.length, _DONE, replies)
        else:
            aside = Parcel(needed)
            self._add_data(request, request.offset, request.length, _DONE, aside)
            replies.add(aside.content())

    def _read_in_pieces(self, request: Request, replies: Replies) -> None:
        """Answer in several chunks, holes without their zeroes; an error becomes the last of them."""
        position, end = request.offset, request.offset + request.length
        while position < end:
            length = min(PIECE, end - position)
            done = position + length == end
            if self._backend.reads_as_zeroes(position, length):
                replies.add(self._framing.hole(request, position, length, done=done))
            elif spliced := self._splice(request, position, end - position, replies, whole=False):
                length = spliced
            else:
                self._add_data(request, position, length, _DONE if done else 0, replies)
            position += length

    def _splice(self, request: Request, offset: int, length: int, replies: Replies, *, whole: bool) -> int:
        """Send up to ``length`` bytes, or all of them, without copying; return how many, 0 for none."""
        source = self._backend.file_range(offset)
        if source is None or length < WORTH_SPLICING:
            return 0
        fitting = min(length, replies.most_to_splice(source))
        if not fitting or (whole and fitting < length):
            return 0
        framing = self._framing
        head = bytearray(framing.data_head)
        done = _DONE if offset + fitting == request.offset + request.length else 0
        framing.put_data_head(head, 0, request.cookie, request.offset, offset, fitting, done)
        return fitting if replies.splice(head, source, fitting) else 0

    def _add_data(self, request: Request, offset: int, length: int, done: int, replies: Replies) -> None:
        """Read straight to the place behind the head of the reply."""
        framing = self._framing
        start = replies.reserve(framing.data_head + length)
        stop = start + framing.data_head + length
        if length:
            self._backend.read_into(offset, replies.view[start + framing.data_head : stop])
        framing.put_data_head(replies.buffer, start, request.cookie, request.offset, offset, length, done)
        replies.used = stop

    def _flush(self, request: Request, replies: Replies) -> None:
        self._backend.flush()
        replies.add(self._framing.success(request))

    def _trim(self, request: Request, replies: Replies) -> None:
        self._backend.trim(request.offset, request.length, bool(request.flags & CommandFlags.FUA))
        replies.add(self._framing.success(request))

    def _cache(self, request: Request, replies: Replies) -> None:
        self._backend.cache(request.offset, request.length)
        replies.add(self._framing.success(request))

    def _write_zeroes(self, request: Request, replies: Replies) -> None:
        flags = request.flags
        self._backend.zero(
            request.offset,
            request.length,
            fua=bool(flags & CommandFlags.FUA),
            may_trim=not flags & CommandFlags.NO_HOLE,
            fast=bool(flags & CommandFlags.FAST_ZERO),
        )
        replies.add(self._framing.success(request))

    def _block_status(self, request: Request, replies: Replies) -> None:
        self._send_extents(request, self._agreement.contexts, replies)

    def _send_extents(
        self, request: Request, contexts: tuple[tuple[int, str], ...], replies: Replies
    ) -> None:
        limit = 1 if request.flags & CommandFlags.REQ_ONE else MAX_EXTENTS
        longest = self._framing.longest_extent

        def look_up(context: str) -> list[Extent]:
            if context == BLOCK_HASHES:
                extents = hash_runs(
                    request.offset, request.length, self._backend.size, self._backend.read_into
                )
            else:
                extents = self._backend.extents(request.offset, request.length, context)
            return descriptors(extents, limit=limit, longest=longest)

        # All are looked up before the first is sent, so that an error stands alone.
        statuses = [(number, look_up(context)) for number, context in contexts]
        for number, extents in statuses:
            done = number == statuses[-1][0]
            replies.add(self._framing.block_status(request, number, extents, done=done))
