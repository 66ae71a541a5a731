"""Another NBD server's export, passed on with its size, block sizes, abilities and meta contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from nbdserve.backends.base import Backend, Buffer, Capabilities
from nbdserve.backends.offset import WHOLE, Slice
from nbdserve.client.export import Export
from nbdserve.client.pace import Pace, timed
from nbdserve.client.pipeline import SILENCE, Client, connect
from nbdserve.client.upstream import PATIENCE, Upstream
from nbdserve.common.errors import UsageError
from nbdserve.common.uri import NbdUri
from nbdserve.protocol.constants import Command, CommandFlags
from nbdserve.protocol.extents import Extent
from nbdserve.protocol.offers import BlockSizes

_NONE = CommandFlags(0)
_PAYLOAD = 16 << 10, 64 << 10, 4 << 20
"""Bytes of one read or write upstream: at least, at first, and at most."""
_RANGE = 1 << 20, 64 << 20, 1 << 30
"""The same of a request that carries no data: the server's disk may take its time."""

_LEAST_PATIENCE, _MOST_PATIENCE = 1.0, 10.0
"""Seconds that the server is given for its last flush when this one ends."""

T = TypeVar("T")


def open_nbd(uri: NbdUri, *, read_only: bool, part: Slice = WHOLE, patience: float = PATIENCE) -> NbdBackend:
    """Serve what another server exports; ``patience`` is for how many seconds requests wait for a lost one.

    Raises ConnectError when it cannot be reached, UsageError when ``part`` does not lie within the export.
    """

    def dial(timeout: float) -> Client:
        return connect(uri, timeout=timeout, silence=max(SILENCE, patience), contexts=None)

    return NbdBackend(Upstream(str(uri), dial, patience=patience), read_only=read_only, part=part)


class NbdBackend(Backend):
    """An export of another server. The backend owns the upstream."""

    def __init__(self, upstream: Upstream, *, read_only: bool, part: Slice = WHOLE) -> None:
        self._upstream = upstream
        self._export = export = upstream.export
        self._base = part.offset
        try:
            self.size = part.length_within(export.size, upstream.name)
        except UsageError:
            upstream.close()
            raise
        self.contexts = export.contexts
        self.block_sizes = _block_sizes(export)
        self.capabilities = Capabilities(
            read_only=read_only or export.read_only,
            flush=export.flush,
            fua=export.fua,
            trim=export.trim,
            zero=export.zero,
            fast_zero=export.fast_zero,
            cache=export.cache,
            rotational=export.rotational,
            # All clients here share what is one client, or several that see one another's writes, there.
            multi_conn=True,
        )
        self._payload, self._range = Pace(*_PAYLOAD), Pace(*_RANGE)
        # What is shorter tells nothing of the link and is one request anyway, as most reads of guests are.
        self._short = export.payload(_PAYLOAD[0] - 1)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer."""
        if len(buffer) <= self._short:
            self._upstream.call(Client.start_read, self._base + offset, buffer)
            return
        for begin, end in self._pieces(offset, len(buffer), self._payload):
            start = timed(Client.start_read, self._payload, end - begin)
            self._upstream.call(start, self._base + offset + begin, buffer[begin:end])

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Write all of ``data``."""
        view = memoryview(data)
        for begin, end in self._pieces(offset, len(data), self._payload):
            start = timed(Client.start_write, self._payload, end - begin)
            self._change(fua, start, self._base + offset + begin, view[begin:end])

    def log_writes(self) -> None:
        """Do nothing: no write is taken at once."""

    def zero(self, offset: int, length: int, fua: bool, may_trim: bool, fast: bool) -> None:
        """Let the server zero the range."""
        flags = _NONE if may_trim else CommandFlags.NO_HOLE
        if fast:
            flags |= CommandFlags.FAST_ZERO
        for begin, end in self._pieces(offset, length, self._range):
            start = timed(Client.start_zero, self._range, end - begin)
            self._change(fua, start, self._base + offset + begin, end - begin, flags)

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Let the server give the range back."""
        for begin, end in self._pieces(offset, length, self._range):
            start = timed(Client.start_trim, self._range, end - begin)
            self._change(fua, start, self._base + offset + begin, end - begin)

    def cache(self, offset: int, length: int) -> None:
        """Let the server bring the range closer."""
        # qemu-nbd takes no more here than in a read.
        for begin, end in self._pieces(offset, length, self._payload):
            start = timed(Client.start_cache, self._payload, end - begin)
            self._upstream.call(start, self._base + offset + begin, end - begin)

    def flush(self) -> None:
        """Let the server flush, if it can."""
        if self._export.flush:
            self._upstream.flush()

    @property
    def unflushed(self) -> bool:
        """Tell whether this process has acknowledged anything that the server has not flushed."""
        return self._upstream.unflushed

    @property
    def last_patience(self) -> float | None:
        """Grant what is left of 10 s: one that others have waited for in vain hardly gets any more."""
        return max(_LEAST_PATIENCE, _MOST_PATIENCE - self._upstream.waited)

    def extents(self, offset: int, length: int, context: str) -> Iterator[Extent]:
        """Yield what the server says of the range; OSError when it fails."""
        place = self._base + offset
        left = self.size - offset
        runs = self._upstream.call(Client.start_extents, place, length, context)
        for run in runs:
            if left <= 0:
                return
            yield Extent(min(run.length, left), run.flags)
            left -= run.length

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """Nothing is."""
        return False

    def needs_network(self, command: Command, offset: int, length: int) -> bool:
        """Everything does."""
        return True

    def close(self) -> None:
        """Take leave of the server."""
        self._upstream.close()

    def _pieces(self, offset: int, length: int, pace: Pace) -> Iterator[tuple[int, int]]:
        """Tell where the requests that make up a range begin and end: as long as the pace says by then."""
        begin = 0
        while begin < length:
            longest = self._export.payload(pace.length) if pace is self._payload else pace.length
            end = begin + self._export.piece(self._base + offset + begin, length - begin, longest)
            yield begin, end
            begin = end

    def _change(
        self,
        fua: bool,
        start: Callable[[Client, int, T, CommandFlags], Future[None]],
        offset: int,
        what: T,
        flags: CommandFlags = _NONE,
    ) -> None:
        """Change the disk at an offset; what does not know FUA is flushed instead."""
        durable = fua and self._export.fua
        if durable:
            flags |= CommandFlags.FUA
        self._upstream.change(durable, start, offset, what, flags)
        if fua and not durable:
            self.flush()


def _block_sizes(export: Export) -> BlockSizes:
    """The server's minimum and preferred sizes; longer requests than it takes are cut up here."""
    default = BlockSizes()
    minimum = export.minimum_block or default.minimum
    preferred = max(export.preferred_block or default.preferred, minimum)
    return BlockSizes(minimum, preferred, default.maximum)
