"""The overlay as a disk that can be exported: what is local is answered in line, what is missing is fetched.

Two modes. Before the cut-over (``armed``), and with copy-on-read off, reads of what is missing pass through
and nothing of it is kept. After ``activate`` what is read is kept, and may be streamed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from nbdserve.backends.base import Backend, Buffer, Capabilities
from nbdserve.backends.splicing import FileRange
from nbdserve.common.errors import ImageError
from nbdserve.protocol.constants import Command, ExtentFlags
from nbdserve.protocol.extents import Extent, coalesce
from nbdserve.protocol.offers import ALLOCATION_DEPTH, BASE_ALLOCATION, BlockSizes
from overlay.backing.failover import Sources
from overlay.backing.reads import LONGEST
from overlay.fill.fetch import Fetcher
from overlay.formats.image import Image, Run, State

_LOG = logging.getLogger("nbd-overlay")

_HERE, _BACKING = 1, 2
"""Allocation depths: in the overlay itself, and in its backing."""
_MOST_STATUS, _MOST_QUESTIONS = 1 << 30, 64
"""Bytes, and absent ranges, whose status is asked for in one reply: it must not take for ever."""


class Changes(Protocol):
    """What makes a guest's changes: the image, or who passes them on to it; see Image for the methods."""

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Store data, if that needs no waiting."""

    def write(self, offset: int, data: Buffer) -> bool:
        """Store data, unless something has to be fetched first."""

    def zero(self, offset: int, length: int) -> bool:
        """Make a range read as zeros, unless something has to be fetched first."""

    def flush(self) -> None:
        """Make every change durable that returned before."""


class Overlay(Backend):
    """An image on top of its backing. Owns the image and the sources.

    ``keep`` is copy-on-read: whether what was read is kept. ``armed`` says that the guest still runs
    elsewhere and changes the backing, so that nothing may be kept before :meth:`activate`.

    Safe for several threads. ``_changing`` keeps :meth:`activate` and :meth:`invalidate` apart. It is held
    for as long as they take, and the locks of claims and image are taken under it; a guest's first write
    waits for it. Nothing else holds a lock of this class, and who fetches holds none at all.

    A write and a flush meet in the image alone. The flush holds the lock of flushes, and under it, for a
    moment each, the lock of the tables: to take what has changed, and to write it down; not while it syncs
    the data in between. A write to a new cluster holds the lock of the tables; one to what the guest has
    written before may hold none (formats/flat/image.py, formats/qed/image.py). The whole order: CONTRIBUTING,
    "Threads and locks".
    """

    always_local = False
    contexts = (BASE_ALLOCATION, ALLOCATION_DEPTH)
    # A flush is one of the whole image, so it covers what was acknowledged on every connection.
    capabilities = Capabilities(fast_zero=True, cache=True, multi_conn=True)

    def __init__(
        self,
        image: Image,
        sources: Sources,
        *,
        keep: bool = True,
        armed: bool = False,
        on_activation: Callable[[], None] = lambda: None,
        changes: Changes | None = None,
    ) -> None:
        """``changes`` is told of what guests change, and passes it on to the image."""
        self.image = image
        self._changes = image if changes is None else changes
        self.sources = sources
        self.fetcher = Fetcher(image, sources)
        self.size = image.size
        self.block_sizes = BlockSizes(preferred=max(4096, min(image.cluster_size, 64 << 10)))
        self._keep = keep
        self._armed = armed
        self._guest_is_here = False
        self._on_activation = on_activation
        self._changing = threading.Lock()

    @property
    def armed(self) -> bool:
        """Tell whether the cut-over is still to come, so that nothing of the backing may be kept."""
        return self._armed

    @property
    def keeps(self) -> bool:
        """Tell whether what guests read is kept now."""
        return self._keep and not self._armed

    def activate(self) -> None:
        """The guest runs here from now on, and the backing changes no more. May be called again."""
        if not self._guest_is_here:
            with self._changing:
                if self._guest_is_here:
                    return
                _LOG.info("the guest runs here: what is read from now on is kept")
                # Nothing of what follows may take the guest's first write for what was copied.
                self._on_activation()
                self._guest_is_here, self._armed = True, False

    @property
    def guest_is_here(self) -> bool:
        """Tell whether the guest is known to run here, so that nothing can be invalidated any more."""
        return self._guest_is_here

    def invalidate(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Forget ranges (offset, length), which the guest has changed at the source.

        Waits for the disk, not for what is being fetched: that may have been read before the guest changed
        it, and is not kept when it comes. Raises OSError: EBUSY once the guest runs here.
        """
        with self._changing:
            if self._guest_is_here:
                raise OSError(errno.EBUSY, "the guest runs here: what it reads cannot be taken away any more")
            try:
                self.image.invalidate(ranges)
            finally:
                # Blocks that are often written are copied again and again: others prove more.
                self.sources.samples.forget(self._is_whole)

    def read_now(self, offset: int, buffer: memoryview) -> bool:
        """Serve what is local without waiting; False when it is not all local."""
        try:
            return self.image.read_now(offset, buffer)
        except (ImageError, MemoryError) as error:
            raise _as_os_error(error) from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole buffer, fetching what is missing; OSError when no server has it."""
        with _data_path():
            while not self.image.read_now(offset, buffer):
                if self.keeps and self._bring(offset, len(buffer)):
                    continue
                if self._read_through(offset, buffer):
                    return

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Store what needs neither a fetch nor a sync; False when it has to wait."""
        if not self._guest_is_here:
            self.activate()
        try:
            return self._changes.write_now(offset, data)
        except (ImageError, MemoryError) as error:
            raise _as_os_error(error) from error

    def log_writes(self) -> None:
        """Let what was stored at once outlive this process."""
        self.image.log_writes()

    def write(self, offset: int, data: Buffer, fua: bool) -> None:
        """Store all of ``data``, fetching no more than the clusters at its edges."""
        # A guest that writes runs here.
        self.activate()
        with _data_path():
            if self._changes.write_now(offset, data):
                self.image.log_writes()
            else:
                while not self._changes.write(offset, data):
                    self._bring_edges(offset, len(data))
                self.image.commit()
            if fua:
                self._changes.flush()

    def zero(self, offset: int, length: int, fua: bool, may_trim: bool, fast: bool) -> None:
        """Make the range read as zeroes. Whole clusters cost no space, whatever ``may_trim`` says."""
        self.activate()
        with _data_path():
            while not self._changes.zero(offset, length):
                if fast:
                    raise OSError(errno.ENOTSUP, "the edges have to be fetched first")
                self._bring_edges(offset, length)
            self.image.commit()
            if fua:
                self._changes.flush()

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """Let the range read as zeroes, but for clusters at its edges that are not here."""
        self.activate()
        size = self.image.cluster_size
        with _data_path():
            if not self._changes.zero(offset, length):
                begin = -(-offset // size) * size
                end = (offset + length) // size * size
                if begin < end:
                    self._changes.zero(begin, end - begin)
            self.image.commit()
            if fua:
                self._changes.flush()

    def cache(self, offset: int, length: int) -> None:
        """Fetch what is missing of the range, if it is to be kept."""
        with _data_path():
            if self.keeps:
                self.fetcher.bring(offset, length)

    def flush(self) -> None:
        """Make everything acknowledged durable, and what was fetched."""
        with _data_path():
            self._changes.flush()

    def extents(self, offset: int, length: int, context: str) -> Iterator[Extent]:
        """Yield what is here, and of what is not, what a server says; data, where none says anything.

        An error would be taken for the end of the disk by QEMU 7.2 and 10.0, so there is none.
        """
        with _data_path():
            runs = list(self.image.runs(offset, length))
        if context == ALLOCATION_DEPTH:
            depths = (Extent(run.length, _BACKING if run.state is State.ABSENT else _HERE) for run in runs)
            return coalesce(depths)
        return coalesce(self._allocation(runs))

    def is_local(self, command: Command, offset: int, length: int) -> bool:
        """Tell what waits for nothing: reads of what is here; when all is, in a plain file, also writes.

        What a damaged image cannot tell is found out by who serves the request.
        """
        if command is Command.READ:
            try:
                return self.image.is_local(offset, length)
            except ImageError:
                return False
        return command is Command.WRITE and self.image.raw_fd is not None

    def needs_network(self, command: Command, offset: int, length: int) -> bool:
        """Tell whether a server may be asked: by what reads, and by changes that need a fetch.

        A trim leaves alone what it would have to fetch.
        """
        if command in (Command.WRITE, Command.WRITE_ZEROES):
            try:
                return self.image.needs_fetch(offset, length)
            except ImageError:
                return True
        return command not in (Command.FLUSH, Command.TRIM)

    def file_range(self, offset: int) -> FileRange | None:
        """Return the plain file that the image has become."""
        fd = self.image.raw_fd
        return None if fd is None else FileRange(fd, offset)

    def close(self) -> None:
        """Hang up, and close the image; OSError when it cannot be made durable."""
        self.fetcher.close()
        self.sources.close()
        self.image.close()

    def _is_whole(self, offset: int) -> bool:
        """Tell whether a block that was copied is here still; not where a damaged image does not tell."""
        try:
            return self.image.is_local(offset, 1)
        except (OSError, ImageError):
            return False

    def _bring(self, offset: int, length: int) -> bool:
        """Fetch and keep a range; False if that fails although a server is there.

        Either a place near it cannot be read, or what was fetched cannot be kept.
        """
        try:
            self.fetcher.bring(offset, length)
        except OSError:
            if not self.sources.connected:
                raise
            return False
        return True

    def _read_through(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer from here and from the backing; False if what was here is not any more."""
        parts: list[tuple[int, memoryview]] = []
        for run in self.image.runs(offset, len(buffer)):
            piece = buffer[run.offset - offset : run.offset - offset + run.length]
            if run.state is State.ABSENT:
                parts += [
                    (run.offset + begin, piece[begin : begin + LONGEST])
                    for begin in range(0, run.length, LONGEST)
                ]
            elif not self.image.read_now(run.offset, piece):
                return False
        with self.fetcher.miss():
            self.sources.read(*parts)
        return True

    def _bring_edges(self, offset: int, length: int) -> None:
        """Make the clusters local that a change covers only partly."""
        for place in self.image.edges(offset, length):
            self.fetcher.bring_cluster(place)

    def _allocation(self, runs: list[Run]) -> Iterator[Extent]:
        """The status of runs in ``base:allocation``, as far as a few questions to the backing tell."""
        questions = _MOST_QUESTIONS
        for run in runs:
            if run.state is State.DATA:
                yield Extent(run.length, 0)
            elif run.state is State.ZERO:
                yield Extent(run.length, int(ExtentFlags.HOLE | ExtentFlags.ZERO))
            else:
                length = min(run.length, _MOST_STATUS)
                yield from self._allocation_of_backing(run.offset, length)
                questions -= 1
                if length < run.length or not questions:
                    return

    def _allocation_of_backing(self, offset: int, length: int) -> Iterator[Extent]:
        end = offset + length
        while offset < end:
            if not self.sources.connected:
                yield Extent(end - offset, 0)
                return
            try:
                found = self.sources.extents(offset, end - offset)
            except OSError:
                yield Extent(end - offset, 0)
                return
            for extent in found:
                length = min(extent.length, end - offset)
                yield Extent(length, extent.flags)
                offset += length
                if offset >= end:
                    return


@contextlib.contextmanager
def _data_path() -> Iterator[None]:
    """In the data path a damaged image is an input/output error, and a lack of memory one of its own."""
    try:
        yield
    except (ImageError, MemoryError) as error:
        raise _as_os_error(error) from error


def _as_os_error(error: ImageError | MemoryError) -> OSError:
    if isinstance(error, MemoryError):
        return OSError(errno.ENOMEM, "no memory is left")
    _LOG.error("%s", error)
    return OSError(errno.EIO, str(error))
